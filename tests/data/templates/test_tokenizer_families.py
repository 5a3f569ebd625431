"""Labels and prompts with tokenizers of every family: what is learnt is each answer, whole, and nothing else."""

from __future__ import annotations

import unicodedata

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.data.templates import families
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.data.types import IMAGE_INDEX, IMAGE_TOKEN
from tinyllava_fast.errors import DataError, UserError

EVERY, OFTEN = 89, 7  # of some 40,000 cases; primes, so that all pipelines, shapes and templates come together


def characters(pipeline, text, adds_special_tokens):
    """Ids of a rendered text, and for each of them the characters of the text that it covers."""
    ids = families.front(pipeline) if adds_special_tokens else []
    covered = [set() for _ in ids]
    begin = 0
    for number, piece in enumerate(text.split(IMAGE_TOKEN)):
        if number:
            ids, covered = [*ids, IMAGE_INDEX], [*covered, set(range(begin, begin + len(IMAGE_TOKEN)))]
            begin += len(IMAGE_TOKEN)
        encoding = families.raw(pipeline).encode(piece, add_special_tokens=False)
        ids += encoding.ids
        covered += [set(range(begin + a, begin + b)) for a, b in encoding.offsets]
        begin += len(piece)
    return ids, covered


def is_lost(text, supervised, covered):
    """Whether a character that can be seen is to be learnt, but no token shows it."""
    missing = supervised - set().union(*covered)
    return any(
        not text[at].isspace() and unicodedata.category(text[at]) not in ("Cc", "Cf", "Mn", "Me") for at in missing
    )


def faults(pipeline, shape, name):
    """What is wrong with the samples of one case, each as a sentence."""
    tok, template = families.tokenizer(pipeline), TEMPLATES.get(name)
    turns, interleaved = families.SHAPES[shape]
    rendered = template.render(turns, tok, interleaved)
    ids, covered = characters(pipeline, rendered.text, template.adds_special_tokens)
    supervised = {at for start, stop in rendered.spans for at in range(start, stop)}
    try:
        [[segment]] = template.encode([turns], tok, interleaved=[interleaved])
    except DataError as error:
        lost = is_lost(rendered.text, supervised, covered) and "answer" in str(error)
        return [] if lost else [f"refused: {error}"]
    found = ["accepted, though characters are lost"] * is_lost(rendered.text, supervised, covered)
    if segment.ids != ids:
        return [*found, "other ids than the tokenizer's own"]
    found += ["an empty or reversed span"] * any(start >= stop for start, stop in segment.spans)
    learnt = {at for start, stop in segment.spans for at in range(start, stop)}
    for at, characters_ in enumerate(covered):
        if ids[at] == IMAGE_INDEX:
            continue
        if characters_ & supervised and at not in learnt:
            found.append(f"token {at} of an answer is not supervised")
        if characters_ and not characters_ & supervised and at in learnt:
            found.append(f"token {at} is supervised but no part of an answer")
    end = template.stop_id(tok)
    if name != "pretrain":
        learnt_ends = sum(segment.labels()[at] == end for at in learnt)
        found += [f"{learnt_ends} end tokens for {len(turns)} answers"] * (learnt_ends != len(turns))
        found += ["an end token beside the answers"] * (name != "tokenizer" and ids.count(end) != len(turns))
    prompt = template.prompt_batch([[*turns[:-1], (turns[-1][0], None)]], tok, [interleaved])[0].ids
    begin = rendered.spans[-1][0]
    joined = any(begin - 1 in covers and begin in covers for covers in covered)  # Template.check warns of it
    joined |= pipeline[2] in ("shorter", "strip") and name == "tokenizer"  # white space at a prompt's end, no more
    joined |= pipeline[0] == "bpe_without_unk" and len(set().union(*covered)) < len(rendered.text)  # offsets are wrong
    if segment.ids[: len(prompt)] != prompt and not joined:
        found.append("the prompt is no prefix of the sample")
    found += ["the prompt ends in an end token"] * (name != "pretrain" and prompt[-1] == end)
    return found


@pytest.mark.parametrize("every", [EVERY, pytest.param(OFTEN, marks=[pytest.mark.slow, pytest.mark.no_cover])])
def test_what_is_learnt_is_each_answer_whole(every):
    tried = list(families.cases(every))
    assert len(tried) > 400 and len({pipeline for pipeline, _, _ in tried}) > 60
    bad = [(case, fault) for case in tried for fault in faults(*case)]
    assert not bad, bad[:5]


def sample(pipeline, name, turns):
    [[segment]] = TEMPLATES.get(name).encode([turns], families.tokenizer(pipeline))
    return segment


def learnt(pipeline, name, turns):
    """The tokens of each answer, as text."""
    tok, segment = families.tokenizer(pipeline), sample(pipeline, name, turns)
    return [tok.convert_ids_to_tokens(segment.ids[start:stop]) for start, stop in segment.spans]


@pytest.mark.parametrize("shape", families.SHAPES)
@pytest.mark.parametrize("name", ["phi", "llama", "tokenizer"])
def test_trimmed_offsets_make_no_difference(name, shape):
    turns, _ = families.SHAPES[shape]
    plain, trimmed = (sample(("bpe", "bytelevel", "none", post), name, turns) for post in ("none", "bytelevel_trim"))
    assert plain == trimmed and len(plain.spans) == len(turns)


@pytest.mark.parametrize(
    ("model", "pre", "expected"),
    [
        ("wordpiece", "bert", ["red</s>", "bluegrey</s>"]),
        ("wordlevel", "whitespace", ["red</s>", "bluegrey</s>"]),
        ("bpe", "whitespace_split", ["red</s>", "bluegrey</s>"]),
        ("unigram", "metaspace_always", ["▁red</s>", "▁blue▁grey</s>"]),
        ("bpe_fallback", "metaspace_never", ["▁red</s>", "▁blue▁grey</s>"]),
        ("bpe", "bytelevel", ["Ġred</s>", "ĠblueĠgrey</s>"]),
    ],
)
def test_tokenizers_that_drop_or_mark_spaces(model, pre, expected):
    turns = [("<image>\nwhat is it?", "red"), ("what colour?", "blue grey")]
    assert ["".join(tokens) for tokens in learnt((model, pre, "none", "none"), "llama", turns)] == expected


@pytest.mark.parametrize("name", ["llama", "pretrain", "tokenizer"])
@pytest.mark.parametrize("post", ["end", "both", "two_in_front", "roberta", "bert", "trim_and_both"])
def test_what_is_added_to_every_text_stands_in_front_alone(name, post):
    """An end token that a tokenizer adds is in no prompt, and once at the end of an answer that the template ends."""
    pipeline = ("bpe", "bytelevel", "none", post)
    tok, template = families.tokenizer(pipeline), TEMPLATES.get(name)
    turns = [("<image>\nwhat is it?", "red"), ("why?", "so")]
    prompt = template.prompt([(turns[0][0], None)], tok).ids
    added = families.front(pipeline) if name != "tokenizer" else []
    assert prompt[: len(added)] == added
    assert not {tok.eos_token_id, tok.convert_tokens_to_ids("[SEP]")} & set(prompt[len(added) :])
    plain = ("bpe", "bytelevel", "none", "none")
    assert prompt[len(added) :] == template.prompt([(turns[0][0], None)], families.tokenizer(plain)).ids
    assert sample(pipeline, name, turns).ids[len(added) :] == sample(plain, name, turns).ids


@pytest.mark.parametrize(
    ("pipeline", "name", "turns", "message"),
    [
        # a byte-level vocabulary without all bytes, and a pre-tokenizer that throws commas away
        (
            ("bpe_without_unk", "whitespace", "none", "none"),
            "llama",
            [("q", "a"), ("q", "ok 猫")],
            r"answer 1 \('ok 猫'\).* '猫'",
        ),
        (("bpe", "punctuation_removed", "none", "none"), "llama", [("q", "a, b; c")], r"answer 0 .* no token of ',;'"),
    ],
)
def test_an_answer_that_loses_characters_is_refused(pipeline, name, turns, message):
    with pytest.raises(DataError, match=message):
        sample(pipeline, name, turns)
    independent = families.tokenizer(pipeline)
    with pytest.raises(DataError, match=message):
        TEMPLATES.get(name).encode([turns], independent, "independent")


def test_an_end_token_that_is_no_token_of_its_own_is_refused():
    """Known to the vocabulary, but not cut out of a text: the model would never learn to stop."""
    words = {"<unk>": 0, "</s>": 1, "red": 2}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    with pytest.raises(DataError, match=r"answer 0 \('red'\): .* would not end in one end token \(id 1\)"):
        TEMPLATES.get("llama").encode([[("what?", "red")]], tok)
    with pytest.raises(UserError, match=r"ends answers with '<\|endoftext\|>', which is unknown to this tokenizer"):
        TEMPLATES.get("phi").check(tok)


def test_reference_masks_want_a_tokenizer_that_adds_bos_alone():
    for post in ("both", "two_in_front", "bert"):
        with pytest.raises(UserError, match=r"data\.masks: reference counts on .* adds '.*; set data.masks=offsets"):
            TEMPLATES.get("llama").check(families.tokenizer(("bpe", "bytelevel", "none", post)), "reference")
    TEMPLATES.get("llama").check(families.tokenizer(("bpe", "bytelevel", "none", "front")), "reference")


def test_a_token_across_prompt_and_answer_is_warned_of(caplog):
    for pre, joined in (("bytelevel", False), ("bytelevel_whole", True)):
        caplog.clear()
        TEMPLATES.get("llama").check(families.tokenizer(("bpe", pre, "none", "none")))
        assert ("joins the end of a prompt and the beginning of its answer" in caplog.text) == joined


def test_a_record_that_loses_characters_is_named(make, talk, processor):
    from tinyllava_fast.config.schema import BatchConfig, DataConfig
    from tinyllava_fast.data.dataset import PackedDataset

    path = make([talk("q", "a"), talk("q", "a 猫", id="bad")]).data.records  # the golden tokenizer takes both
    tok = families.tokenizer(("bpe_without_unk", "whitespace", "none", "none"))
    with pytest.raises(DataError, match=r"data.json: record 1 \(id 'bad', line 1\): .* answer 0 \('a 猫'\): .* '猫'"):
        PackedDataset(
            DataConfig(records=path), BatchConfig(), tokenizer=tok, processor=processor, tokens_per_image=4, seed=0
        )
