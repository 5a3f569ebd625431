"""A data set split by image: no picture on both sides, the same split whatever else changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyllava_fast.data.records import Record
from tinyllava_fast.data.split import Split, taken


def record(index: int, *images: str, text: str = "what?") -> Record:
    return Record(index, f"r{index}", index + 1, images, len(images) > 1, ((text, "x"),))


RECORDS = [
    *(record(i, f"{i % 300}.png") for i in range(900)),
    *(record(900 + i, text=f"say {i % 100}") for i in range(200)),
    *(record(1100 + i, f"{i % 300}.png", f"{(7 * i + 1) % 300}.png") for i in range(300)),
]


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5])
def test_no_picture_and_no_text_is_on_both_sides(share: float) -> None:
    held, kept = ([r for r in RECORDS if Split(share, side).takes(r)] for side in (True, False))
    for seen in (lambda r: set(r.images), lambda r: {r.turns} if not r.images else set()):
        mine, theirs = (set().union(*map(seen, side)) for side in (held, kept))
        assert mine and theirs and not mine & theirs
    neither = [r for r in RECORDS if r not in held and r not in kept]
    assert all(len(r.images) == 2 for r in neither), "only records with pictures of both sides are on neither"
    pictures = set().union(*(r.images for r in held))
    assert len(pictures) / 300 == pytest.approx(share, rel=0.5)


def test_a_smaller_share_is_part_of_a_larger_one_and_names_decide() -> None:
    small, large = ({r.index for r in RECORDS[:900] if Split(share, held_out=True).takes(r)} for share in (0.05, 0.2))
    assert small < large
    split = Split(0.5, held_out=True)
    assert [split.takes(record(0, f"a/{i}.png")) for i in range(50)] == [
        split.takes(record(9, f"a/./b/../{i}.png")) for i in range(50)
    ]


def test_taken_reads_one_side(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "x"}]
    rows = [{"id": i, "image": f"{i}.png", "conversations": turns} for i in range(40)]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(rows))
    sides = [[r.id for r in taken(str(path), Split(0.3, side))] for side in (True, False)]
    assert sorted(map(int, sides[0] + sides[1])) == list(range(40)) and all(sides)
    assert len(list(taken(str(path), None))) == 40
