"""Guesses are what followed the longest end that stood before; how many are made follows from how many were right."""

from __future__ import annotations

import random

import pytest

from tinyllava_fast.infer.scheduling.sequence import IMAGE_ROW, Sequence
from tinyllava_fast.infer.scheduling.speculation import LENGTHS, MOST_ROWS, History, Speculation
from tinyllava_fast.infer.types import Request, Sampling


def searched(tokens: list[int], most: int) -> list[int]:
    """The guesses by a search of everything."""
    for length in LENGTHS:
        for at in range(len(tokens) - 1, length - 1, -1):
            if tokens[at - length : at] == tokens[len(tokens) - length :]:
                found = list(tokens)
                while len(found) < len(tokens) + most and found[at + len(found) - len(tokens)] >= 0:
                    found.append(found[at + len(found) - len(tokens)])
                return found[len(tokens) :]
    return []


def test_guesses_are_what_a_search_finds() -> None:
    rng = random.Random(0)
    seen = 0
    for _ in range(200):
        tokens = [rng.choice((1, 2, 3, IMAGE_ROW)) for _ in range(rng.randrange(1, 60))]
        history, start = History(6), 0
        while start < len(tokens):  # in parts, as they come
            stop = rng.randrange(start, len(tokens)) + 1
            history.extend(tokens[start:stop])
            start = stop
        room = rng.randrange(1, 9)
        expected = searched(tokens, min(room, 6))
        assert history.guess(room) == expected
        seen += bool(expected)
    assert seen > 100


def test_what_repeats_itself_goes_on() -> None:
    history = History(7)
    history.extend([9, 1, 2, 1, 2])
    assert history.guess(7) == [1, 2, 1, 2, 1, 2, 1]


def test_wrong_guesses_make_it_wait() -> None:
    history = History(8)
    history.extend([1, 2, 3] * 3)
    pauses = []
    for _ in range(8):
        waited = 0
        while not (found := history.guess(8)):
            waited += 1
        pauses.append(waited)
        history.learn(len(found), 0)
    assert pauses == [0, 2, 4, 8, 16, 32, 32, 32]
    while not (found := history.guess(8)):
        pass
    assert len(found) == 1
    for right in (1, 2, 4, 8, 8):
        assert len(found) == right
        history.learn(len(found), right)
        found = history.guess(8)
    history.learn(8, 2)
    assert len(history.guess(8)) == 3


def running(new: int = 50, rows: int = 40, **sampling: object) -> Sequence:
    request = Request.ask("?", sampling=Sampling(max_new_tokens=new, **sampling))
    sequence = Sequence(request, [1, 2, 3, 4] * 5, num_reserved_rows=rows)
    sequence.tokens = [1]
    sequence.num_cached_tokens = 20
    return sequence


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        (running(), 8),
        (running(new=4), 2),  # the last token is not fed back
        (running(new=2), 0),
        (running(rows=24), 3),
        (running(rows=21), 0),
        (running(temperature=0.5), 0),
    ],
    ids=["all", "four new", "two new", "few rows", "no row", "sampled"],
)
def test_guesses_fit_the_answer_and_its_rows(sequence: Sequence, expected: int) -> None:
    assert [len(g) for g in Speculation(8).guess([sequence]).values()] == [expected] * bool(expected)
    assert not Speculation(0).guess([sequence])


def test_many_sequences_leave_no_room() -> None:
    for count in range(1, MOST_ROWS + 2):
        sequences = [running() for _ in range(count)]
        guesses = Speculation(8).guess(sequences)
        assert count + sum(map(len, guesses.values())) <= max(count, MOST_ROWS)
        assert bool(guesses) == (2 * count <= MOST_ROWS)
