"""Templates against the recorded vectors of the reference, and the properties the packer relies on."""

from __future__ import annotations

import functools

import pytest

from tests.vectors import GOLDEN, load
from tinyllava_fast.data.templates.base import TEMPLATES, turns_of
from tinyllava_fast.data.tokenizer import load_tokenizer
from tinyllava_fast.data.types import IGNORE_INDEX, IMAGE_INDEX
from tinyllava_fast.errors import DataError, UserError


@functools.cache
def golden(name):
    return load(GOLDEN / name)


@functools.cache
def tokenizer(name, pad=None):
    loaded = load_tokenizer(GOLDEN / "tokenizers" / name)
    if pad is not None:
        loaded.pad_token = pad
    return loaded


GROUPS = golden("templates.json")["groups"]
CASES = [
    pytest.param(g, c, id=f"{g['template']}-{g['tokenizer']}-{g['llm_hook']}-{c['name']}")
    for g in GROUPS
    for c in g["cases"]
]


def no_images(labels):
    """The reference leaves -200 in the labels and overwrites it with -100 when it splices the image."""
    return [IGNORE_INDEX if x == IMAGE_INDEX else x for x in labels]


def test_groups_are_all_here():
    assert len(GROUPS) == 16 and len(CASES) == 16 * 38
    assert {g["template"] for g in GROUPS} <= set(TEMPLATES)


@pytest.mark.parametrize("group,case", CASES)
def test_golden(group, case):
    template = TEMPLATES.get(group["template"])
    tok = tokenizer(group["tokenizer"], group["pad_token"])
    if "error" in case:
        with pytest.raises(DataError, match="2 questions but 1 answers"):
            template.encode([case["messages"]], tok)
        return
    if case["mode"] == "eval" and group["template"] == "pretrain":
        # The reference ends in a literal "{{content}}"; ours leaves the image to be described.
        assert template.prompt(case["messages"], tok).ids[-1] == IMAGE_INDEX
        return
    assert template.render(turns_of(case["messages"]), tok).text == case["prompt"]
    if case["mode"] == "eval":
        assert template.prompt(case["messages"], tok).ids == case["input_ids"]
        return
    [[exact]] = template.encode([case["messages"]], tok, masks="reference")
    assert exact.ids == case["input_ids"]
    assert exact.labels() == no_images(case["labels"])
    [[default]] = template.encode([case["messages"]], tok)
    assert default.ids == case["input_ids"]
    if case.get("mismatch"):
        assert any(x != IGNORE_INDEX for x in default.labels())
    else:
        assert default.labels() == no_images(case["labels"])


@pytest.mark.parametrize("group", GROUPS[:7], ids=lambda g: g["tokenizer"] + g["llm_hook"])
def test_reference_masks_with_a_length_limit(group):
    """Once the running length reaches the limit the reference checks nothing and leaves labels where they fell."""
    limited = next(
        g
        for g in golden("templates_maxlen.json")["groups"]
        if all(g[k] == group[k] for k in ("template", "tokenizer", "llm_hook"))
    )
    by_name = {c["name"]: c for c in group["cases"]}
    tok = load_tokenizer(GOLDEN / "tokenizers" / group["tokenizer"])
    tok.pad_token, tok.model_max_length = group["pad_token"], 48
    compared = 0
    for case in limited["cases"]:
        full = by_name[case["name"]]
        if "error" in case or "error" in full:
            continue
        labels = full["labels"] if case["labels"] is None else case["labels"]
        [[found]] = TEMPLATES.get(group["template"]).encode([full["messages"]], tok, masks="reference")
        assert found.labels() == no_images(labels), case["name"]
        compared += 1
    assert compared > 20


def test_batches_equal_single_calls():
    tok, template = tokenizer("llama_spm"), TEMPLATES.get("llama")
    cases = [c["messages"] for c in GROUPS[0]["cases"] if c["mode"] == "train" and "error" not in c]
    assert template.encode(cases, tok) == [template.encode([c], tok)[0] for c in cases]


@pytest.mark.parametrize("name,tok", [("llama", "llama_spm"), ("llama", "llama_spm_b"), ("phi", "phi_bytebpe")])
@pytest.mark.parametrize("masks", ["offsets", "reference"])
def test_independent_turns_have_the_tokens_of_single_turn_samples(name, tok, masks):
    template, tok = TEMPLATES.get(name), tokenizer(tok, "<unk>" if name == "llama" else "<|endoftext|>")
    turns = [("What is it?\n<image>", "a cat"), ("Is it   red?", " no, blue\n"), ("Why?", "")]
    [[prefix, *rest]] = template.encode([turns], tok, "independent", masks)
    assert prefix.ids[-1] == IMAGE_INDEX and prefix.spans == [] and not prefix.on_prefix
    assert len(rest) == 3
    for segment, (question, answer) in zip(rest, turns, strict=True):
        single = [(f"<image>\n{question.replace('<image>', '')}", answer)]
        [[whole]] = template.encode([single], tok, masks=masks)
        assert segment.on_prefix
        assert prefix.ids + segment.ids == whole.ids
        assert prefix.labels() + segment.labels() == whole.labels()


def test_independent_turns_without_a_shared_image():
    template, tok = TEMPLATES.get("llama"), tokenizer("llama_spm")
    turns = [("What?", "a cat"), ("Why?", "so")]
    [segments] = template.encode([turns], tok, "independent")
    assert segments == [template.encode([[turn]], tok)[0][0] for turn in turns]
    one = [("<image>\nWhat?", "a cat")]
    assert template.encode([one], tok, "independent") == template.encode([one], tok)
    pretrain = TEMPLATES.get("pretrain")
    [segments] = pretrain.encode([[("<image>", "a cat"), ("", "so")]], tok, "independent")
    assert [s.on_prefix for s in segments] == [False, False]
    assert segments[1].labels().count(IGNORE_INDEX) == 2  # BOS and the image


def test_prompts_of_one_image_begin_alike_and_as_in_training():
    template, tok = TEMPLATES.get("llama"), tokenizer("llama_spm")
    first, second = (p.ids for p in template.prompt_batch([[(f"<image>\n{q}", None)] for q in ("what?", "why?")], tok))
    cut = first.index(IMAGE_INDEX) + 1
    assert first[:cut] == second[:cut] and first[cut:] != second[cut:]
    [[trained]] = template.encode([[("<image>\nwhat?", "")]], tok)
    assert trained.ids[: len(first)] == first


def test_stop():
    assert (TEMPLATES.get("llama").eos, TEMPLATES.get("llama").stop_id(tokenizer("llama_spm"))) == ("</s>", 2)
    assert TEMPLATES.get("pretrain").stop_id(tokenizer("llama_spm")) == 2
    with pytest.raises(UserError, match=r"ends answers with '</s>', which is \d tokens .*'<\|endoftext\|>'"):
        TEMPLATES.get("llama").stop_id(tokenizer("phi_bytebpe"))
    with pytest.raises(UserError, match="unknown chat template 'lama'; did you mean 'llama'"):
        TEMPLATES.get("lama")


@pytest.mark.parametrize(
    "name,turns,has_image,expected",
    [
        ("llama", [("<image>\nq", "a")], True, None),
        ("llama", [("q", "a")], False, None),
        ("llama", [("q ASSISTANT: </s>", "a")], False, None),
        ("llama", [("<image>\nq", "a")], False, "a question contains <image> but the record names no image"),
        ("llama", [("q", "a")], True, "names an image but no question contains <image>"),
        ("llama", [("q", "a"), ("r", "see <image>")], False, "answer 1 contains the template's own '<image>'"),
        ("llama", [("q", "x ASSISTANT: y")], False, "answer 0 contains the template's own ' ASSISTANT: '"),
        ("llama", [("q", "end</s>")], False, "answer 0 contains the template's own '</s>'"),
        ("phi", [("q", "end</s>")], False, None),
        ("phi", [("q", "<|endoftext|>")], False, "answer 0 contains the template's own '<|endoftext|>'"),
        ("pretrain", [("q", "a")], True, None),
        ("pretrain", [("q", "a")], False, "the record names no image, which this template needs"),
    ],
)
def test_problems(name, turns, has_image, expected):
    found = TEMPLATES.get(name).problem(turns, has_image)
    assert found is None if expected is None else expected in (found or "")
