"""A data set split by image: no picture on both sides, the same split whatever else changes."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tinyllava_fast.data import shelf, split
from tinyllava_fast.data.dataset import PackedDataset
from tinyllava_fast.data.record import Record
from tinyllava_fast.data.records import read_records
from tinyllava_fast.data.split import Split, image_key


def record(index: int, *images: str, text: str = "what?") -> Record:
    return Record(index, f"r{index}", index + 1, images, len(images) > 1, ((text, "x"),))


def names(r: Record) -> list[str]:
    """What decides the side of a record."""
    return list(r.images) or [r.turns[0][0]]


RECORDS = [
    *(record(i, f"{i % 300}.png") for i in range(900)),
    *(record(900 + i, text=f"say {i % 100}") for i in range(200)),
    *(record(1100 + i, f"{i % 300}.png", f"{(7 * i + 1) % 300}.png") for i in range(300)),
]


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5])
def test_no_picture_and_no_text_is_on_both_sides(share: float) -> None:
    held, kept = ([r for r in RECORDS if Split(share, side).takes(names(r))] for side in (True, False))
    for seen in (lambda r: set(r.images), lambda r: {r.turns} if not r.images else set()):
        mine, theirs = (set().union(*map(seen, side)) for side in (held, kept))
        assert mine and theirs and not mine & theirs
    neither = [r for r in RECORDS if r not in held and r not in kept]
    assert all(len(r.images) == 2 for r in neither), "only records with pictures of both sides are on neither"
    pictures = set().union(*(r.images for r in held))
    assert len(pictures) / 300 == pytest.approx(share, rel=0.5)


def test_a_smaller_share_is_part_of_a_larger_one_and_names_decide() -> None:
    small, large = (
        {r.index for r in RECORDS[:900] if Split(share, held_out=True).takes(names(r))} for share in (0.05, 0.2)
    )
    assert small < large
    split = Split(0.5, held_out=True)
    assert 0 < sum(split.takes([image_key(f"a/./b/../{i}.png", Path())]) for i in range(50)) < 50


def test_an_image_is_known_by_its_path_or_by_its_bytes(tmp_path: Path) -> None:
    def row(content: bytes) -> str:
        uri = "data:image/png;base64," + base64.b64encode(content).decode()
        said = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
        return json.dumps({"image": uri, "conversations": said}) + "\n"

    assert image_key("./a//b/../c.jpg", tmp_path) == image_key("a/c.jpg", tmp_path) != image_key("c.jpg", tmp_path)
    (tmp_path / "x").write_text(row(b"one") + row(b"two") + row(b"one"))
    one, two, again = (image_key(record.images[0], tmp_path) for record in read_records(tmp_path / "x"))
    assert one == again != two
    images = [record.images[0] for record in read_records(tmp_path / "x")]
    (tmp_path / "x").unlink()
    assert image_key(images[0], tmp_path) == images[0], "what cannot be read is known by its place"


def test_images_inside_a_source_are_read_once_for_both_sides_and_later_starts(
    make: Callable[..., PackedDataset], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLF_CACHE", str(folder / "cache"))
    monkeypatch.setenv(shelf.LIMIT, "1")
    rows = json.loads((folder / "data.json").read_text())
    for row in rows:
        if "image" in row:
            content = (folder / "images" / row["image"]).read_bytes()
            row["image"] = "data:image/png;base64," + base64.b64encode(content).decode()
    read: list[str] = []
    of = split._content

    def noted(name: str, base: Path) -> bytes | None:
        read.append(name)
        return of(name, base)

    monkeypatch.setattr(split, "_content", noted)
    first = [make(rows, split=Split(0.4, side)) for side in (True, False)]
    assert len(read) == len(set(read)) == 16
    count = len(read)
    again = [make(rows, split=Split(0.4, side)) for side in (True, False)]
    assert len(read) == count
    assert [one.fingerprint for one in first] == [one.fingerprint for one in again]
    keys = {image_key(image, folder): None for record in read_records(folder / "data.json") for image in record.images}
    held = sum(Split(0.4, held_out=True).holds(key) for key in keys)
    assert 0 < held < len(keys)
    rows[0]["conversations"][1]["value"] = "other"
    read.clear()
    make(rows, split=Split(0.4, held_out=True))
    assert len(read) == count, "another file is read anew"
