"""No image is on both sides of a split, and the sides are a function of the seed and the images."""

from __future__ import annotations

import json
import random
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tinyllava_fast.data.records import read_records
from tinyllava_fast.errors import UserError
from tinyllava_fast.prepare.cli import main
from tinyllava_fast.prepare.split import NAMES, split


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(count: int) -> list[dict[str, Any]]:
    """Records about one image, about two, and about none; three records an image."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        image: object = f"{number // 3}.png" if number % 20 else [f"{number // 3}.png", f"{number // 3 + 1}.png"]
        marker = "<image>" * (2 if isinstance(image, list) else 1)
        said = [{"from": "human", "value": f"{marker}\nq"}, {"from": "gpt", "value": "a"}]
        rows.append({"id": str(number), "image": image, "conversations": said})
    said = [{"from": "human", "value": "the same"}, {"from": "gpt", "value": "a"}]
    return [*rows, *({"id": f"t{n}", "conversations": said} for n in range(5))]


def sides(folder: Path) -> list[dict[str, tuple[str, ...]]]:
    return [{record.id: record.images for record in read_records(folder / name)} for name in NAMES]


def test_no_image_is_on_both_sides(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", rows_of(600))
    found = split(path, tmp_path / "parts", 0.1)
    train, held = sides(tmp_path / "parts")
    assert (len(train), len(held)) == (found.train, found.held_out) and len(train) + len(held) == 605
    assert 0.09 <= len(held) / 605 <= 0.1
    seen, kept = ({image for images in side.values() for image in images} for side in (train, held))
    assert kept and not seen & kept
    assert len({f"t{n}" in held for n in range(5)}) == 1


def test_two_spellings_of_a_path_are_one_image(tmp_path: Path) -> None:
    rows = rows_of(300)
    for number, row in enumerate(rows):
        if number % 2 and isinstance(row.get("image"), str):
            row["image"] = f"./{row['image']}"
    split(write(tmp_path / "set.jsonl", rows), tmp_path / "parts", 0.1)
    train, held = ({i.removeprefix("./") for r in side.values() for i in r} for side in sides(tmp_path / "parts"))
    assert held and not train & held


def test_the_order_of_records_does_not_matter_but_the_seed_does(tmp_path: Path) -> None:
    rows = rows_of(300)
    mixed = random.Random(0).sample(rows, len(rows))
    held = []
    for number, (some, seed) in enumerate([(rows, 0), (mixed, 0), (rows, 1)]):
        split(write(tmp_path / f"{number}.jsonl", some), tmp_path / f"parts{number}", 0.1, seed)
        held.append(set(sides(tmp_path / f"parts{number}")[1]))
    assert held[0] == held[1] != held[2]


@pytest.mark.parametrize(
    ("share", "said"), [(0.0, "between 0 and 1"), (1.0, "between 0 and 1"), (0.001, "give a larger --share")]
)
def test_a_share_that_leaves_a_side_empty_is_refused(share: float, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", rows_of(60))
    with pytest.raises(UserError, match=said):
        split(path, tmp_path / "parts", share)
    assert not (tmp_path / "parts").exists()


def test_the_command_does_not_write_over_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["split", str(write(tmp_path / "set.jsonl", rows_of(60))), str(tmp_path / "parts"), "--share", "0.2"]
    assert main(command) == 0
    assert "held out" in capsys.readouterr().err
    assert main(command) == 2
    assert "exists; choose another folder" in capsys.readouterr().err


def test_fields_that_are_no_json_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a table; check --fix writes the same way."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"question": f"q{n}", "answer": "a", "at": datetime(2020, 1, 1), "raw": b"x", "tag": "t"} for n in range(9)]
    rows = [row | {"score": float("nan") if n else 1.0} for n, row in enumerate(rows)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    said = "left out: 'at' (9 records), 'raw' (9 records), 'score' (8 records)"
    assert main(["split", str(tmp_path / "set.parquet"), str(tmp_path / "parts"), "--share", "0.4"]) == 0
    assert capsys.readouterr().err.count(said) == 1
    assert main(["check", str(tmp_path / "set.parquet"), "--fix", str(tmp_path / "fixed.jsonl")]) == 0
    assert capsys.readouterr().err.count(said) == 1
    parts = [json.loads(line) for name in NAMES for line in (tmp_path / "parts" / name).open()]
    fixed = [json.loads(line) for line in (tmp_path / "fixed.jsonl").open()]
    assert len(parts) == len(fixed) == 9 and all(row["tag"] == "t" and "at" not in row for row in [*parts, *fixed])
    assert sorted(row.get("score", 0) for row in parts) == [0] * 8 + [1.0]
