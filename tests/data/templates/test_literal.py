"""What people type stays text: no marker or control token comes of it, nothing is lost, ordinary text has its ids."""

from __future__ import annotations

import functools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.data.templates import families
from tests.data.templates.test_tokenizer import GOOD
from tests.vectors import GOLDEN
from tinyllava_fast.data.templates import _literal
from tinyllava_fast.data.templates._controls import secret_tokenizer
from tinyllava_fast.data.templates._literal import literal_prompts
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.data.tokenizer import load_tokenizer
from tinyllava_fast.data.types import IMAGE_INDEX, IMAGE_TOKEN, ImagePart
from tinyllava_fast.errors import UserError

IMAGE = ImagePart.IMAGE
CONTROLS = ["<unk>", "<s>", "</s>", "<pad>", "<eos>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "[SEP]"]
WORDS = [*"abcdefghijklmnopqrstuvwxyz", "what", "user", "assistant", "chat", "the", "im", "end", "end|>", "</", "s>"]
LETTERS = sorted(
    {chr(code) for code in range(33, 127)}
    | set("é\u0301\u0338≯猫İıß▁\u200b\x00\n\t\ue000\ue001")
    | {chr(code) for code in range(0xFF01, 0xFF5F)}  # full-width forms of ASCII
)
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CHATML = families.CHATML


def wide(text):
    """The same in letters that NFKC turns into those of the text."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def _bytelevel():
    vocab = {token: n for n, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("e", "n"), ("en", "d"), ("|", ">"), ("end", "|>"), ("<", "/"), ("</", "s"), ("</s", ">"), ("Ġ", "a")]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return models.BPE(vocab, merges), whole, None, decoders.ByteLevel()


def _unigram():
    vocab = [("<unk>", 0.0), *((c, -6.0) for c in LETTERS)]
    vocab += [(w, -4.0) for w in ["▁a", *WORDS[26:]]] + [(c, 0.0) for c in CONTROLS[1:]]  # the model itself knows them
    return models.Unigram(vocab, 0), pre_tokenizers.Metaspace("▁", "first"), None, decoders.Metaspace("▁", "first")


def _wordpiece():
    tokens = dict.fromkeys(["<unk>", *CONTROLS, *LETTERS, *WORDS, *("##" + c for c in LETTERS + WORDS)])
    model = models.WordPiece({t: n for n, t in enumerate(tokens)}, unk_token="<unk>", max_input_chars_per_word=1000)
    return model, pre_tokenizers.WhitespaceSplit(), normalizers.BertNormalizer(lowercase=True), decoders.WordPiece()


def _llama():
    vocab = {t: n for n, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *LETTERS])}
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True), None, prepend, decoders.Sequence(steps)


def _nfkc():
    vocab = {token: n for n, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    steps = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return models.BPE(vocab, []), pre_tokenizers.ByteLevel(add_prefix_space=False), steps, decoders.ByteLevel()


KINDS = {"bytelevel": _bytelevel, "unigram": _unigram, "wordpiece": _wordpiece, "llama": _llama, "nfkc": _nfkc}
FLAGS = {
    "special": {"special": True, "normalized": False},
    "special_normalized": {"special": True, "normalized": True},
    "added": {"special": False, "normalized": False},
    "added_normalized": {"special": False, "normalized": True},
    "greedy": {"special": True, "normalized": False, "lstrip": True, "rstrip": True},
    "greedy_normalized": {"special": False, "normalized": True, "lstrip": True, "rstrip": True},
    "single": {"special": False, "normalized": True, "single_word": True},
}


@functools.cache
def tokenizer(kind, flags):
    model, cut, normalizer, decoder = KINDS[kind]()
    backend = Tokenizer(model)
    backend.decoder = decoder
    if cut is not None:
        backend.pre_tokenizer = cut
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens([AddedToken(name, **FLAGS[flags]) for name in CONTROLS])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **NAMES)


def messages(turns, literal=True):
    """Turns as messages; literal: their texts as parts around the markers."""
    found = []
    for question, answer in turns:
        found.append({"from": "human", "value": parts(question) if literal else question})
        found.append({"from": "gpt", "value": parts(answer) if literal and answer is not None else answer})
    return found


def parts(text):
    found = []
    for number, part in enumerate(text.split(IMAGE_TOKEN)):
        found += [IMAGE] if number else []
        found += [part] if part else []
    return found


def prompt(tok, name, conversation, interleaved=False):
    return literal_prompts(TEMPLATES.get(name), [conversation], tok, [interleaved])[0]


def own_prompt(tok, name, conversation, interleaved=False):
    return TEMPLATES.get(name).prompt_batch([conversation], tok, [interleaved])[0].ids


def control_ids(tok, ids):
    """Ids of a prompt that stand for control tokens, the unknown one left out, whose every text is text."""
    named = {*tok.all_special_ids, *tok.added_tokens_decoder, IMAGE_INDEX} - {tok.unk_token_id}
    return [i for i in ids if i in named]


def squeezed(text):
    return "".join(text.replace("▁", " ").split())


def decoded(tok, ids):
    return squeezed(tok.decode([i for i in ids if i != IMAGE_INDEX], clean_up_tokenization_spaces=False))


def normal(tok, text):
    normalizer = tok.backend_tokenizer.normalizer
    return squeezed(text if normalizer is None else normalizer.normalize_str(text))


# Ordinary text


@pytest.mark.parametrize("every", [211, pytest.param(17, marks=pytest.mark.slow)])
def test_ordinary_text_has_its_ids_with_tokenizers_of_every_family(every):
    tried, bad = 0, []
    for pipeline, shape, name in families.cases(every):
        tok, (turns, interleaved) = families.tokenizer(pipeline), families.SHAPES[shape]
        turns = [*turns[:-1], (turns[-1][0], None)]
        want = own_prompt(tok, name, messages(turns, literal=False), interleaved)
        tried += 1
        if prompt(tok, name, messages(turns), interleaved) != want:
            bad.append((pipeline, shape, name))
    assert tried > 150 and not bad, bad[:5]


@pytest.mark.parametrize("folder", sorted(path.name for path in (GOLDEN / "tokenizers").iterdir()))
def test_ordinary_text_has_its_ids_with_the_recorded_tokenizers(folder):
    tok = load_tokenizer(GOLDEN / "tokenizers" / folder)
    tok.chat_template = CHATML.replace("<|im_end|>", tok.eos_token)
    for name in TEMPLATES:
        for turns, interleaved in families.SHAPES.values():
            turns = [*turns[:-1], (turns[-1][0], None)]
            want = own_prompt(tok, name, messages(turns, literal=False), interleaved)
            assert prompt(tok, name, messages(turns), interleaved) == want


@pytest.mark.parametrize("source", [source for source, _, _ in GOOD.values()], ids=list(GOOD))
def test_ordinary_text_has_its_ids_with_chat_templates(source):
    backend = families.tokenizer(("bpe", "bytelevel", "none", "none")).backend_tokenizer
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=source, **NAMES)
    tok.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<end_of_turn>"]})
    turns = [("What is it?\n<image>", "A cat."), ("  Why? ", "It is   furry,\n\nis it not?"), (" So?\n", None)]
    want = own_prompt(tok, "tokenizer", messages(turns, literal=False))
    assert prompt(tok, "tokenizer", messages(turns)) == want


def test_the_copy_with_secret_names_gives_the_same_ids(monkeypatch):
    """Nothing about ordinary text depends on which of the two tokenizers encodes it."""

    def anew(piece, _, plain, controls):
        own = [token for token in controls.found(plain, piece.plain) if _literal._is_inside(token, piece.plain_own)]
        secret = secret_tokenizer(controls)
        text = _literal._renamed(piece, own, controls, secret.names)
        return _literal.encode_pieces(secret, [text])[text].ids

    monkeypatch.setattr(_literal, "_ids", anew)
    for kind in KINDS:
        for flags in FLAGS:
            tok = tokenizer(kind, flags)
            if flags == "single" and kind in ("unigram", "wordpiece"):
                continue  # where its added tokens do not match, the model has them as pieces, which the copy has not
            for name in TEMPLATES:
                turns = [("<image>\nwhat is it", "red é"), (" so ", None)]
                want = own_prompt(tok, name, messages(turns, literal=False))
                assert prompt(tok, name, messages(turns)) == want, (kind, flags, name)


# What people type

PIECES = [
    *CONTROLS, *(wide(c) for c in CONTROLS), *(c.upper() for c in CONTROLS), *(c[:-2] for c in CONTROLS),
    *(c[2:] for c in CONTROLS), "<|im_\u0301end|>", "</s>\u0338", "USER:", "ASSISTANT:", "user\n", "assistant\n",
    "<0x0A>", "{{", "}}", "{% raw %}", " ", "\n", "  ", "\t", "what", "a", "猫", "▁", "\u200b", "\ue0000\ue001", "\x00",
]  # fmt: skip
NASTY = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join)
TYPED = st.lists(st.one_of(NASTY, st.text(LETTERS, min_size=1, max_size=5), st.just(IMAGE)), min_size=1, max_size=4)


def plain(part):
    """A part without anything but letters and signs, and white space at its ends."""
    if part is IMAGE:
        return part
    return re.sub(r"\S.*\S|\S", lambda m: "".join("x" if re.match(r"\w", c) else "." for c in m[0]), part, flags=re.S)


def faults(tok, name, typed):
    """What is wrong with a prompt in which people said these things, question and answer in turn."""
    texts = ["".join("" if part is IMAGE else part for part in value) for value in typed]
    conversation = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(typed)]
    harmless = [{**m, "value": list(map(plain, m["value"]))} for m in conversation]
    opened = {"from": "gpt", "value": None}
    ids = prompt(tok, name, [*conversation, opened], interleaved=True)
    found = []
    if control_ids(tok, ids) != control_ids(tok, prompt(tok, name, [*harmless, opened], interleaved=True)):
        found.append(f"control tokens {tok.convert_ids_to_tokens([i for i in ids if i >= 0])}")
    whole = decoded(tok, ids)
    for number, text in enumerate(texts):
        if IMAGE not in typed[number] and (number % 2 or name != "pretrain") and normal(tok, text.strip()) not in whole:
            found.append(f"{text!r} is not in {whole!r}")
    return found


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("kind", KINDS)
def test_no_control_token_comes_of_what_is_typed_and_nothing_is_lost(kind, name):
    @settings(deadline=None, max_examples=60, database=None, derandomize=True)
    @given(st.sampled_from(sorted(FLAGS)), TYPED, NASTY, TYPED)
    def check(flags, question, answer, last):
        assert not faults(tokenizer(kind, flags), name, [question, [answer], last])

    check()


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_no_control_token_comes_of_what_is_typed_with_tokenizers_of_every_family(every):
    typed = [*families.SPECIAL, *map(wide, families.SPECIAL), "<|IM_END|>", "<|im_", "end|> USER: </", "s> a<s>b猫 <"]
    harmless = list(map(plain, typed))
    tried, bad = 0, []
    for pipeline in families.pipelines()[::every]:
        tok = families.tokenizer(pipeline)
        for name in ("llama", "qwen2_instruct", "tokenizer"):
            found = [
                prompt(tok, name, messages([("a", "".join(text)), (text[0], "b"), (text[-1], None)]))
                for text in (typed, harmless)
            ]
            names, want = (tok.convert_ids_to_tokens(control_ids(tok, ids)) for ids in found)
            tried += 1
            if [n for n in names if not _is_byte(n)] != [n for n in want if not _is_byte(n)]:
                bad.append((pipeline, name, names))
    assert tried > 100
    assert not bad, bad[:5]


def _is_byte(token):
    return re.fullmatch("<0x..>", token) is not None


def test_a_space_that_a_normalizer_puts_beside_a_letter_is_no_part_of_it():
    """A token that swallows it seems to cover the letter."""
    tok = tokenizer("wordpiece", "greedy_normalized")
    turns = [("what", "a 猫"), ("so", None)]
    assert prompt(tok, "llama", messages(turns)) == own_prompt(tok, "llama", messages(turns, literal=False))
    assert not faults(tok, "llama", [["</s>"], ["</s> 猫"], ["猫"]])


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(
    "typed",
    [
        ["<|im_end|>"],
        ["say </s> and <|im_end|>!"],
        ["<|im_", "end|>"],
        ["end|> or <|im_"],
        ["<image>"],
        ["<ima", "ge>"],
        [wide("</s>")],
        ["</S>"],
    ],
    ids=repr,
)
def test_a_control_token_that_is_typed_is_text(typed, flags):
    for kind in KINDS:
        tok = tokenizer(kind, flags)
        talk = [[*typed, " <|im"], ["ok <|im_"], ["end|>", *typed]]
        assert not faults(tok, "qwen2_instruct", talk), kind
        assert not faults(tok, "tokenizer", talk), kind


def test_what_is_typed_has_the_ids_of_its_characters():
    tok = tokenizer("bytelevel", "special")
    alphabet = {token: number for token, number in tok.get_vocab().items() if len(token) == 1}
    ids = prompt(tok, "qwen2_instruct", [{"from": "human", "value": ["</s>"]}, {"from": "gpt", "value": None}])
    around = own_prompt(tok, "qwen2_instruct", [{"from": "human", "value": "~~"}, {"from": "gpt", "value": None}])
    at = around.index(alphabet["~"])
    assert ids == [*around[:at], tok.convert_tokens_to_ids("</s"), alphabet[">"], *around[at + 2 :]]


def test_runs_of_spaces_that_are_added_tokens_are_text():
    tok = load_tokenizer(GOLDEN / "tokenizers" / "phi_bytebpe")
    runs = {number for number, token in tok.added_tokens_decoder.items() if not token.content.strip()}
    conversation = [{"from": "human", "value": ["if so:\n        stop"]}, {"from": "gpt", "value": None}]
    ids = prompt(tok, "phi", conversation)
    assert runs & set(ids)
    assert ids == own_prompt(tok, "phi", [conversation[0] | {"value": conversation[0]["value"][0]}, conversation[1]])


def test_markers_come_of_image_parts_alone_and_stay_in_their_places():
    tok = tokenizer("bytelevel", "special")
    talk = [["<image> ", IMAGE, " or ", IMAGE, "?"], ["<image>"], [IMAGE, "\n", "<image>", "and this"]]
    conversation = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(talk)]
    ids = prompt(tok, "qwen2_instruct", [*conversation, {"from": "gpt", "value": None}], interleaved=True)
    text = tok.decode([tok.convert_tokens_to_ids("[SEP]") if i == IMAGE_INDEX else i for i in ids])
    assert text.endswith(
        "USER: <image> [SEP] or [SEP]? ASSISTANT: <image><|im_end|>USER: [SEP]\n<image>and this ASSISTANT:"
    )


@pytest.mark.parametrize("name", ["llama", "qwen2_instruct", "tokenizer"])
def test_one_image_has_its_place_of_the_training(name):
    tok = tokenizer("bytelevel", "special")
    own = own_prompt(tok, name, messages([("what is it?\n<image>", None)], literal=False))
    assert prompt(tok, name, messages([("what is it?\n<image>", None)])) == own


@pytest.mark.parametrize("system", ["Answer in French.", "", " Be kind, ~. ", ["Answer ", "in French."]], ids=repr)
def test_a_system_message_replaces_the_system_text(system):
    tok = tokenizer("bytelevel", "special")
    turn = messages([("why?", None)])
    template = TEMPLATES.get("llama").with_system("".join(system))
    assert prompt(tok, "llama", [{"from": "system", "value": system}, *turn]) == template.prompt(turn_of(turn), tok).ids
    said = [{"role": "system", "content": "".join(system)}, {"role": "user", "content": "why?"}]
    want = tok.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    assert prompt(tok, "tokenizer", [{"from": "system", "value": system}, *turn]) == want


def turn_of(messages):
    return [(messages[0]["value"][0], None)]


def test_a_system_message_is_literal_in_both_forms():
    tok = tokenizer("bytelevel", "special")
    for name in ("llama", "tokenizer"):
        harmless = prompt(tok, name, [{"from": "system", "value": "~"}, *messages([("why?", None)])])
        for value in ("<|im_end|><image></s>", ["<|im_end|><image></s>"]):
            ids = prompt(tok, name, [{"from": "system", "value": value}, *messages([("why?", None)])])
            assert control_ids(tok, ids) == control_ids(tok, harmless)
            assert "<|im_end|><image></s>" in tok.decode(ids)


REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
SKIPS = CHATML.replace("messages %}", "messages if m['role'] != 'system' %}")
CUTS = CHATML.replace("m['content']", "m['content'][:3]")


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (REFUSES, "tokenizer", "no system role"),
        (SKIPS, "tokenizer", "shows no system text"),
        (CHATML, "pretrain", "no place for a system text"),
    ],
)
def test_a_template_without_a_place_for_a_system_text(source, name, message):
    tok = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer("bytelevel", "special").backend_tokenizer, chat_template=source, **NAMES
    )
    with pytest.raises(UserError, match=message):
        prompt(tok, name, [{"from": "system", "value": "Be kind."}, *messages([("<image>\nwhy?", None)])])


def test_a_template_that_alters_texts_is_refused():
    tok = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer("bytelevel", "special").backend_tokenizer, chat_template=CUTS, **NAMES
    )
    with pytest.raises(UserError, match="does not show the texts of all messages as they are"):
        prompt(tok, "tokenizer", messages([("a" * 5, "b"), ("c", None)]))


def test_half_a_surrogate_is_refused_by_name():
    with pytest.raises(UserError, match="half of a surrogate pair"):
        prompt(tokenizer("bytelevel", "special"), "llama", messages([("a\ud800b", None)]))
