"""Texts to tokens and offsets: what a tokenizer adds, leaves out, reorders, and cannot take."""

from __future__ import annotations

import doctest

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.data.templates import families
from tinyllava_fast.data.templates import _pieces
from tinyllava_fast.data.templates._pieces import Offsets, added_ids, encode_pieces
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.errors import DataError


def test_examples_of_the_module():
    assert doctest.testmod(_pieces) == (0, 6)


@pytest.mark.parametrize("post", families.POST_PROCESSORS)
def test_what_is_added_is_known_and_left_out(post):
    pipeline = ("bpe", "bytelevel", "none", post)
    tok, plain = families.tokenizer(pipeline), families.raw(pipeline)
    whole = tok("a red cat").input_ids
    front, end = added_ids(tok)
    assert front + plain.encode("a red cat").ids + end == whole
    assert front == families.front(pipeline)
    encoded = encode_pieces(tok, ["", " red ", "", "é"])
    assert list(encoded) == ["", " red ", "é"] and encoded[""].ids == []
    assert encoded[" red "].offsets[0][0] == 0 and encoded[" red "].offsets[-1][1] == 5
    assert tok("a red cat").input_ids == whole, "the tokenizer is left as it was"


def test_padding_and_truncation_of_the_tokenizer_do_not_count():
    tok = families.tokenizer(("bpe", "bytelevel", "none", "front"))
    tok.backend_tokenizer.enable_padding(length=20, pad_id=3, pad_token="<pad>")
    tok.backend_tokenizer.enable_truncation(4)
    assert added_ids(tok) == ([1], [])


@pytest.mark.parametrize("text", ["caf\udce9?", "\ud83d", "what is \ud83d this", "\ude42 x"])
def test_half_of_a_surrogate_pair(text):
    tok = families.tokenizer(("bpe", "bytelevel", "none", "front"))
    with pytest.raises(DataError, match="contains half of a surrogate pair") as caught:
        TEMPLATES.get("phi").prompt([(f"<image>\n{text}", None)], tok)
    assert str(caught.value).isascii()
    assert encode_pieces(tok, ["\U0001f642"])["\U0001f642"].ids


def lost(offsets, text):
    return offsets.lost(text, 0, len(text), offsets.span(0, len(text)))


def test_offsets_that_go_back():
    """A normalizer that reorders combining marks: every token that reaches in is in the span."""
    offsets = Offsets([(0, 1), (2, 3), (1, 2), (3, 4)])
    assert [offsets.span(i, i + 1) for i in range(4)] == [(0, 1), (1, 3), (1, 3), (3, 4)]
    assert offsets.span(0, 4) == (0, 4) and lost(offsets, "abcd") == ""


def test_tokens_of_no_width():
    mark = Offsets([(0, 2), (2, 2), (2, 3)])  # a mark of its own before the last character
    assert (mark.span(2, 3), mark.span(0, 2), mark.span(0, 3)) == ((1, 3), (0, 1), (0, 3))
    assert Offsets([]).span(0, 4) is None and lost(Offsets([]), "a b") == "ab"


def test_what_can_be_lost_without_harm():
    """White space, control and format characters, and marks that are part of a letter."""
    text = "a \t\n\u200d\ufeff\u0301\u00adb"
    assert lost(Offsets([(0, 1), (len(text) - 1, len(text))]), text) == ""
    assert lost(Offsets([(0, 1)]), "a,猫,+") == ",猫+"


def wrapped(model, normalizer=None, **names):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.mark.parametrize(
    "model", [models.WordLevel({"red": 0, "</s>": 1}), models.WordLevel({}), models.Unigram([("a", -1.0)])]
)
@pytest.mark.parametrize("name", ["llama", "pretrain"])
def test_a_tokenizer_without_an_unknown_token(model, name):
    tok = wrapped(model, eos_token="</s>")
    with pytest.raises(DataError, match=r"cannot encode a text: .*or that has an unknown token"):
        TEMPLATES.get(name).encode([[("<image>", "blue")]], tok)


def test_an_end_token_that_a_normalizer_makes_of_an_answer():
    words = {"<unk>": 0, "well": 1, "yes": 2}
    tok = wrapped(models.WordLevel(words, unk_token="<unk>"), normalizers.Lowercase(), unk_token="<unk>")
    tok.backend_tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=True)])
    with pytest.raises(DataError, match="would not end in one end token"):
        TEMPLATES.get("llama").encode([[("what?", "well </S> yes")]], tok)
