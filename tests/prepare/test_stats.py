"""What stats says of a set is what was put into it; copies, near copies and overlap are found, others are not."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.tiny import make_tokenizer
from tinyllava_fast.data.records import read_records
from tinyllava_fast.errors import DataError
from tinyllava_fast.prepare.cli import main
from tinyllava_fast.prepare.overlap import read_against
from tinyllava_fast.prepare.pictures import NEAR, ROW, _bits, look, near_groups, rows_of
from tinyllava_fast.prepare.sources import looked_at
from tinyllava_fast.prepare.stats import Spread, stats
from tinyllava_fast.prepare.stats_page import page, text


def scene(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A smooth picture, as photographs are."""
    rough = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), np.uint8)
    return Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)


def talk(image: str | None, *said: str, **more: Any) -> dict[str, Any]:
    marker = "<image>\n" if image else ""
    turns = [{"from": ("human", "gpt")[n % 2], "value": (marker if not n else "") + t} for n, t in enumerate(said)]
    return {"conversations": turns, **({"image": image} if image else {}), **more}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six pictures: 0 to 3 differ, "copy" has the bytes of 0, "near" is 1 saved smaller as JPEG."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        scene(number).save(folder / f"{number}.png")
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    scene(1).resize((64, 54)).save(folder / "near.jpg", quality=70)
    (folder / "broken.png").write_bytes(b"\x89PNG nothing")
    return folder


def found(photos: Path, rows: list[dict[str, Any]], against: list[Any] = (), **more: Any) -> Any:  # type: ignore[assignment]
    path = photos.parent / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [source] = looked_at(str(path), str(photos), tokenizer=more.pop("tokenizer", None))
    return stats(source, against, **more)


ROWS = [
    talk("0.png", "what is it ?", "red"),
    talk("copy.png", "what is it ?", "red"),
    talk("1.png", "and this ?", "blue", "sure ?", "yes"),
    talk("near.jpg", "is it blue ?", "yes"),
    talk(None, "hello ?", "a"),
    talk(None, "hello ?", "a"),
    talk("broken.png", "what is it ?", "no"),
    {"conversations": []},
]


def test_counts_are_those_of_the_set(photos: Path) -> None:
    counts = found(photos, ROWS).counts
    assert counts == {
        "records": 7, "refused": 1, "text alone": 2, "turns": 8, "images shown": 5, "images": 5,
        "conversations that stand in an earlier record": 2, "images that cannot be read": 1,
        "images that are copies of an earlier one": 1, "groups of images that look alike": 1,
        "images in these groups": 2, "records that are copies of an earlier one": 2,
    }  # fmt: skip


def test_spreads_and_pages(photos: Path) -> None:
    one = found(photos, ROWS)
    assert (one.spreads["width"].least, one.spreads["width"].most) == (64, 96)
    assert one.spreads["turns"].bins == [6, 1] and one.spreads["characters of answers"].total == 3 + 3 + 7 + 3 + 2 + 2
    assert " 7  records" in text(one)
    html = page([one])
    assert html.count('<svg class="chart"') == len(one.spreads) and "<script" not in html and "http" not in html


def test_without_images_nothing_is_opened(photos: Path) -> None:
    one = found(photos, ROWS, pixels=False)
    assert "width" not in one.spreads and one.counts["records that are copies of an earlier one"] == 1


def test_tokens_come_from_the_store(photos: Path) -> None:
    one = found(photos, ROWS, tokenizer=None)
    assert "tokens" not in one.counts
    make_tokenizer().save_pretrained(photos.parent / "tok")
    one = found(photos, ROWS, tokenizer=str(photos.parent / "tok"))
    assert one.counts["samples"] == 7 and 0 < one.shares["of the tokens are learnt"] < 1
    assert one.spreads["tokens of a sample"].count == 7


def test_overlap_with_an_evaluation_set(photos: Path) -> None:
    asked = [
        {"image": "eval.png", "question": "What  is it ?", "answer": ["red", "dark red"]},
        {"image": "again.jpg", "text": "another", "label": "yes"},
        {"image": None, "question": "hello ?", "answer": "b"},
    ]
    (photos / "eval.png").write_bytes((photos / "0.png").read_bytes())
    scene(1).resize((120, 100)).save(photos / "again.jpg", quality=80)
    (photos / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    shared = found(photos, ROWS, [read_against(str(photos / "questions.jsonl"))]).shared[0]
    assert (shared.questions, shared.same_image, shared.near_image, shared.same_question, shared.both) == (
        3,
        2,
        4,
        5,
        2,
    )
    assert [where.split(" (")[0] for where in shared.first] == ["record 0", "record 1"]
    with pytest.raises(DataError, match="holds no questions"):
        (photos / "none.jsonl").write_text('{"a": 1}\n')
        read_against(str(photos / "none.jsonl"))


def test_what_an_evaluation_set_could_not_be_compared_by_is_said(photos: Path) -> None:
    asked = [{"image": f"eval{n}.png", "question": "What is it ?"} for n in range(3)]
    lines = [*map(json.dumps, asked), '{"id": }', '{"a": 1}']
    path = photos / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(
        DataError, match=r"none of its 3 images can be read, the first is .*eval0\.png.*--against-images"
    ):
        read_against(str(path))
    (photos / "eval1.png").write_bytes((photos / "0.png").read_bytes())
    one = found(photos, ROWS, [read_against(str(path), str(photos))])
    shared = one.shared[0]
    assert (shared.questions, shared.left_out, shared.images, shared.unreadable, shared.same_image) == (3, 2, 3, 2, 2)
    assert shared.both == 2, "one about a file that cannot be read is none about another such file"
    said = text(one)
    assert " 2  entries of it cannot be read" in said and " 2  of its 3 images cannot be read" in said
    without = found(photos, ROWS, [read_against(str(path), pixels=False)], pixels=False)
    assert without.shared[0].same_image is None and without.shared[0].same_question == 3
    assert "show an image" not in text(without) and "show such an image" not in page([without])


def test_all_images_of_an_evaluation_set_are_compared_wherever_they_lie(photos: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    zero, three = ((photos / f"{n}.png").read_bytes() for n in (0, 3))
    uri = "data:image/png;base64," + base64.b64encode(zero).decode()
    sets: dict[str, list[dict[str, Any]]] = {
        "list": [{"images": [{"bytes": three}, {"bytes": zero}], "question": "Which ?"}],
        "one": [{"images": {"bytes": zero}, "question": "Which ?"}],
        "bytes": [{"image": zero, "text": "Which ?"}],
        "uri": [{"images": ["3.png", uri], "question": "Which ?"}],
    }
    for name, rows in sets.items():
        path = photos / name
        if name == "uri":
            path.write_text(json.dumps(rows[0]) + "\n")
        else:
            parquet.write_table(pa.Table.from_pylist(rows), path)
        shared = found(photos, ROWS, [read_against(str(path))]).shared[0]
        assert (shared.questions, shared.left_out, shared.unreadable, shared.same_image) == (1, 0, 0, 2), name


def test_samples_that_no_pack_holds_are_counted_and_long_ones_cut_as_in_training(own: Path) -> None:
    out = own / "my.yaml"
    rows = json.loads((own / "records.json").read_text())
    rows[0]["conversations"][1]["value"] = "red " * 900
    rows.append({"image": ["0.png"] * 9, "conversations": [{"from": "human", "value": "<image>" * 9},
                                                           {"from": "gpt", "value": "blue"}]})  # fmt: skip
    (own / "records.json").write_text(json.dumps(rows))
    assert main(["init", str(own / "records.json"), str(own / "images"), str(out), "--vocab", "300"]) == 0
    config = yaml.safe_load(out.read_text())
    stage = config["stages"][0]
    longest = 0
    for overlong in ("fail", "truncate"):
        stage.setdefault("data", {})["overlong"] = overlong
        stage.setdefault("batch", {}).update(tokens=700, max_images=8, max_segments=32)
        out.write_text(yaml.safe_dump(config))
        [source] = looked_at(str(out))
        counts = stats(source, pixels=False).counts
        assert counts["samples longer than a pack may hold"] == (overlong == "fail")
        assert counts.get("samples that are cut") == (1 if overlong == "truncate" else None)
        assert counts["samples of more images or segments than a pack may hold"] == 1
        longest, before = counts["packs of an epoch"], longest
    assert longest == before + 1


def test_near_copies_are_found_and_others_are_not(photos: Path) -> None:
    files = [scene(n) for n in range(60)]
    for number, image in enumerate(files):
        image.save(photos / f"s{number}.png")
        image.resize((200, 160)).save(photos / f"s{number}.jpg", quality=60)
    names = [f"s{number}.{end}" for end in ("png", "jpg") for number in range(60)]
    groups = near_groups(rows_of([np.array([look(name, str(photos), photos)]) for name in names]))
    alike = groups[:60] == groups[60:]
    assert alike.mean() >= 0.95 and np.array_equal(groups[:60], np.arange(60))
    assert np.array_equal(groups[60:], np.where(alike, np.arange(60), np.arange(60, 120)))


def test_groups_are_those_of_all_pairs() -> None:
    generator = np.random.default_rng(0)
    rows = np.zeros(300, ROW)
    rows["seen"] = generator.integers(0, 2**63, 30, np.uint64)[generator.integers(0, 30, 300)]
    rows["seen"] ^= np.uint64(1) << generator.integers(0, 64, 300).astype(np.uint64)
    rows["cells"] = generator.integers(0, 2, (300, 1)) * 100
    apart = np.stack([_bits(rows["seen"] ^ one) for one in rows["seen"]])
    linked = (apart <= NEAR) & (rows["cells"][:, None, 0] == rows["cells"][None, :, 0])
    groups = np.arange(300)
    for _ in range(10):
        groups = np.where(linked, groups[None], 300).min(1)
    assert np.array_equal(near_groups(rows), groups)


def test_a_spread_of_one_value_and_of_none() -> None:
    assert Spread.of(np.zeros(0, np.int64)) is None
    one = Spread.of(np.full(5, 7))
    assert one is not None and (one.bins, one.least, one.most, one.mean) == ([5], 7, 7, 7)


def test_the_command_writes_all_three(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = own / "my.yaml"
    assert main(["init", str(own / "records.json"), str(own / "images"), str(out), "--vocab", "300"]) == 0
    command = ["stats", str(out), "--json", str(own / "s.json"), "--html", str(own / "s.html")]
    assert main([*command, "--against", str(own / "questions.jsonl"), "--against-images", str(own / "images")]) == 0
    said = capsys.readouterr().out
    assert "of the packs is filled" in said and "8  records ask the same about the same image" in said
    [one] = json.loads((own / "s.json").read_text())
    assert one["counts"]["records"] == len(list(read_records(own / "records.json"))) == 8
    assert one["counts"]["packs of an epoch"] >= 1 and "<svg" in (own / "s.html").read_text()
    assert main(["stats", str(own / "none.json")]) == 2
