"""Pieces that wait together become one, and an answer never overtakes its pieces."""

from __future__ import annotations

from tinyllava_fast.infer.live import Piece
from tinyllava_fast.infer.types import Answer
from tinyllava_fast.serve.answering import joined


def test_pieces_that_wait_are_joined_in_order():
    answer = Answer(id="a", text="ab", tokens=[1, 2], finish="eos", prompt_tokens=1)
    events = [(0, Piece("a", (1,))), (1, Piece("x", (5,))), (0, Piece("b", (2,))), (0, answer), (1, Piece("y", (6,)))]
    assert list(joined(events)) == [(0, Piece("ab", (1, 2))), (0, answer), (1, Piece("xy", (5, 6)))]
    error = ValueError("x")
    assert list(joined([(0, Piece("a", (1,))), (0, error)])) == [(0, Piece("a", (1,))), (0, error)]
    assert list(joined([])) == []
