from __future__ import annotations

import pytest

from tinyllava_fast.data.bpe import SMALLEST, pieces, train_tokenizer
from tinyllava_fast.errors import UserError


def test_pieces_leave_out_end_tokens_and_image_markers() -> None:
    found = pieces([("<image>\nWhat is it?", "A cat."), ("Why?", "It purrs.")])
    assert not any("</s>" in piece or "<image>" in piece for piece in found)
    assert any("What is it?" in piece for piece in found) and any("It purrs." in piece for piece in found)


def test_the_smallest_vocabulary_writes_any_text() -> None:
    tokenizer = train_tokenizer(["aaaa bbbb"], SMALLEST)
    assert len(tokenizer) == SMALLEST
    assert tokenizer.decode(tokenizer("ξ = 3 🐱").input_ids, skip_special_tokens=True) == "ξ = 3 🐱"
    with pytest.raises(UserError, match="a vocabulary of 99,999,999,999 is too large; give 1,048,576 at most"):
        train_tokenizer(["a"], 99999999999)
    with pytest.raises(UserError, match="a vocabulary of 259 is too small"):
        train_tokenizer(["a"], SMALLEST - 1)


def test_a_set_of_one_word_has_fewer_tokens_than_asked_for() -> None:
    assert len(train_tokenizer(["red red red"], 5000)) < 300
