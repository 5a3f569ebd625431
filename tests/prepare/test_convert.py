"""Whatever is written in another form is read back as the same records, or refused by name; nothing is half written."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllava_fast.data.formats._base import RECORD_FORMATS, RecordFormat, base_of, find_files
from tinyllava_fast.data.formats._embedded import Embedded, picture_of
from tinyllava_fast.data.formats._shapes import SHAPES, Shown, Whole, check_held, extras_of, fields_of, normal
from tinyllava_fast.data.record import FaultError, Record
from tinyllava_fast.data.records import read_records
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.prepare.cli import main
from tinyllava_fast.prepare.convert import convert

pytest.importorskip("pyarrow")

FORMATS = [name for name in RECORD_FORMATS if type(RECORD_FORMATS.get(name)).write is not RecordFormat.write]
FORMS = [(name, shape) for name in FORMATS for shape in (SHAPES if name != "csv" else [None])]
Q, A = "Which colour? é猫", 'It is "red",\r\nor so; = 1\t'


def talk(*said: str, **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": ("human", "gpt")[n % 2], "value": t} for n, t in enumerate(said)], **more}


PLAIN = [
    talk(f"<image>\n{Q}", A, id="one", image="0.png"),
    talk(f"{Q}\nand?", "", id="no image"),
    talk("<image>\n", "1", id="7", image="1.png", system="Be brief."),
]
MORE = {
    "several turns": talk(f"<image>\n{Q}", A, "and now?", "<b>", image="2.png"),
    "a list of images": talk("<image>\n<image>\nThe same?", A, image=["0.png", "1.png"]),
    "a list of one": talk("what\n<image>\nis it?", A, "Sure?", A, image=["0.png"]),
    "other fields": talk(Q, A, source="x", score=0.5, tags=["a", "b"], ok=True, count=3),
    "a text": talk(Q, A, source="somebody"),
}


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, images: Path) -> list[tuple[Record, list[bytes | str]]]:
    """Return the records as far as they mean something, and their images."""
    found = []
    for record in read_records(path, extra=partial(extras_of)):
        pictures = [picture_of(image, str(images), base_of(path)) for image in record.images]
        content = [p.read() if isinstance(p, Embedded) else Path(p).read_bytes() for p in pictures]
        found.append((replace(normal(record), line=0, place="", images=()), content))
    return found


def change(source: Path, form: tuple[str, Any], out: Path, own: Path, **more: Any) -> Path:
    target = out / f"{len(list(out.iterdir()))}.{'json' if form[0] == 'json' and len(form[1] or '') % 2 else 'x'}"
    convert(source, target, form[0], shape=form[1], image_folder=own / "images", **more)
    assert find_files(target).format is RECORD_FORMATS.get(form[0])
    return target


@pytest.fixture
def out(own: Path) -> Path:
    (own / "out").mkdir()
    return own / "out"


def test_every_format_that_is_read_is_written() -> None:
    assert sorted(FORMATS) == ["arrow", "csv", "datasets", "json", "parquet", "webdataset"]


@pytest.mark.parametrize("first", FORMATS)
def test_there_and_back_between_all_formats(first: str, own: Path, out: Path) -> None:
    start = change(write(own, PLAIN), (first, None), out, own)
    for second in FORMATS:
        if second == "csv" and RECORD_FORMATS.get(first).always_inside:
            with pytest.raises(DataError, match=r"record 0 .*: image: bytes, which a text cannot hold"):
                change(start, (second, None), out, own)
            continue
        there = change(start, (second, None), out, own)
        if first == "csv" and RECORD_FORMATS.get(second).always_inside:
            back = out / "back.csv"
            convert(there, back, first, images=out / "files")
            assert read(back, out / "files") == read(start, own / "images")
            continue
        back = change(there, (first, None), out, own)
        assert read(back, own / "images") == read(start, own / "images") == read(there, own / "images"), second


@pytest.mark.parametrize(
    ("form", "name"), list(product(FORMS, MORE)), ids=lambda v: "-".join(filter(None, v)) if v else ""
)
def test_a_record_is_the_same_or_refused_by_field(form: tuple[str, Any], name: str, own: Path, out: Path) -> None:
    start = write(own, [*PLAIN, MORE[name]])
    refused = {
        ("csv", "several turns"): "conversations: 2 questions, and a line holds one",
        ("csv", "a list of images"): "image: 2 images, and a line holds one",
        ("csv", "a list of one"): "conversations: 2 questions",
        ("csv", "other fields"): "score: expected text, got 0.5; leave it out with --drop score",
    }.get((form[0], name))
    if refused:
        with pytest.raises(DataError, match=rf"set.jsonl: record 3 \(id '3', line 4\): {refused}"):
            change(start, form, out, own)
        assert not list(out.iterdir())
        return
    target = change(start, form, out, own)
    assert read(target, own / "images") == read(start, own / "images")
    if form[0] != "csv":  # and with all images inside, without the folder
        inside = change(target, form, out, own, embed=True)
        assert [c for _, c in read(inside, own / "none")] == [c for _, c in read(start, own / "images")]


texts = st.lists(st.sampled_from(["a", "\n", " ", "<image>", "é", '"', ","]), max_size=6).map("".join)


@settings(max_examples=80, deadline=None, database=None, derandomize=True)
@given(
    st.lists(st.tuples(texts, texts), min_size=1, max_size=3),
    st.integers(0, 2),
    st.booleans(),
    st.one_of(st.none(), texts.map(str.strip).filter(bool)),
    st.sampled_from(SHAPES),
    st.booleans(),
)
def test_no_record_is_changed_in_silence(
    turns: list[tuple[str, str]], images: int, listed: bool, system: str | None, shape: Any, beside: bool
) -> None:
    """What ``check_held`` lets pass is the same conversation, whatever the shape made of it."""
    record = Record(0, "id", 1, tuple("ab"[:images]), images > 1 or (listed and images == 1), tuple(turns), system)
    one = Whole(record, tuple(map(Shown, record.images)), "set")
    try:
        values = fields_of(record, shape, record.images, beside=beside)
        check_held(one, json.loads(json.dumps(values)))
    except (FaultError, DataError):
        assert shape != "llava"  # which holds every record
        return
    said = json.dumps(values, ensure_ascii=False)
    for text in (part for turn in turns for part in turn):
        for piece in filter(str.strip, text.replace("<image>", "\n").split("\n")):
            assert json.dumps(piece.strip(), ensure_ascii=False)[1:-1] in said


@pytest.mark.parametrize(
    ("row", "said", "drop"),
    [
        ({"conversations": [{"from": "human", "value": "q", "weight": 0}, {"from": "gpt", "value": "a"}]},
         r"conversations\[0\].weight: is read by nothing here", "weight"),
        ({"conversations": [{"from": f, "value": "v"} for f in ("gpt", "human", "gpt")]},
         r"conversations\[0\].value: is read by nothing here", "value"),
        ({"messages": [{"role": "user", "content": [{"image_url": {"url": "0.png", "detail": "low"}, "type": "image"}]},
                       {"role": "assistant", "content": "a"}]}, r"\.image_url\.detail: is read by nothing", "detail"),
    ],
    ids=["weight", "leading answer", "detail"],
)  # fmt: skip
def test_what_is_read_by_nothing_is_not_lost_in_silence(
    row: dict[str, Any], said: str, drop: str, own: Path, out: Path
) -> None:
    with pytest.raises(DataError, match=said):
        convert(write(own, [row]), out / "x", "json")
    convert(write(own, [row]), out / "x", "json", drop=[drop])
    assert len(list(read_records(out / "x"))) == 1


def test_columns_of_a_table_that_have_no_place_are_named(own: Path, out: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"question": ["q"], "answer": ["a"], "sound": [b"x"], "on": pa.array([0], pa.date32())})
    parquet.write_table(table, own / "x")
    with pytest.raises(DataError, match=r"record 0 \(id '0', row 0\): sound: holds bytes"):
        convert(own / "x", out / "x", "json")
    with pytest.raises(DataError, match=r"record 0 .*: on: .*--drop on"):
        convert(own / "x", out / "x", "json", drop=["sound"])
    convert(own / "x", out / "x", "json", drop=["sound", "on"])
    mixed = write(own, [talk("q", "a", score=1), talk("q", "a", score="high")])
    with pytest.raises(DataError, match=r"record 1 .*: score: a column holds one kind, here a whole number"):
        convert(mixed, out / "y", "parquet")


def test_images_become_files_and_records_name_them(own: Path, out: Path) -> None:
    start = write(own, [*PLAIN, MORE["a list of images"]])
    inside = change(start, ("parquet", None), out, own, embed=True)
    convert(inside, out / "back.json", "json", images=out / "files")
    records = list(read_records(out / "back.json"))
    assert len(os.listdir(out / "files")) == 2 and records[0].images == records[3].images[:1]
    assert read(out / "back.json", out / "files") == read(start, own / "images")
    convert(start, out / "copy.jsonl", "json", image_folder=own / "images", images=out / "copy")
    assert sorted(os.listdir(out / "copy")) == ["0.png", "1.png"]


def test_nothing_is_left_of_what_fails(own: Path, out: Path) -> None:
    rows = [*PLAIN, talk("<image>\nq", "a", image="none.png", id="gone")]
    for form in ("webdataset", "parquet"):
        with pytest.raises(DataError, match=r"record 3 \(id 'gone', line 4\): image: .*none.png: cannot be read"):
            change(write(own, rows), (form, None), out, own, embed=True)
    with pytest.raises(UserError, match="exists; name another place"):
        convert(own / "set.jsonl", own / "records.json", "json")
    with pytest.raises(UserError, match="did you mean 'parquet'"):
        convert(own / "set.jsonl", out / "x", "parket")
    with pytest.raises(UserError, match="leave out --images"):
        convert(own / "set.jsonl", out / "x", "webdataset", images=out / "y")
    assert not list(out.iterdir())


def test_the_command(own: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records, images = str(own / "records.json"), str(own / "images")
    command = ["convert", records, str(out / "x.tar"), "--to", "webdataset", "--image-folder", images]
    assert main(command) == 0
    assert "8 records that show 8 images" in capsys.readouterr().err
    assert main(["convert", str(out / "x.tar"), str(out / "x.csv"), "--to", "csv", "--images", str(out / "new")]) == 0
    assert read(out / "x.csv", out / "new") == read(own / "records.json", own / "images")
    assert main(command) == 2


def test_the_datasets_library_reads_what_is_written(own: Path, out: Path) -> None:
    datasets = pytest.importorskip("datasets")
    start = write(own, [*PLAIN, MORE["a list of images"]])
    folder = change(start, ("datasets", "openai"), out, own, embed=True)
    made = datasets.load_from_disk(str(folder))
    assert len(made) == 4 and made[0]["images"][0].size == (20, 12) and len(made[3]["images"]) == 2
    file = change(start, ("parquet", None), out, own, embed=True)
    assert datasets.Dataset.from_parquet(str(file), cache_dir=str(out))[0]["image"].size == (20, 12)


def test_the_webdataset_library_reads_what_is_written(own: Path, out: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    path = change(write(own, PLAIN), ("webdataset", None), out, own)
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode("pil"))
    assert [sample.get("png") and sample["png"].size for sample in samples] == [(20, 12), None, (20, 12)]
    assert samples[2]["json"]["system"] == "Be brief."


@pytest.mark.parametrize(("to", "images"), [("datasets", "set/pictures"), ("json", "."), ("json", "set/../set")])
def test_places_inside_each_other_are_refused(to: str, images: str, own: Path) -> None:
    folder = own / "new"
    target = folder / ("set" if to == "datasets" or "set" in images else "records.json")
    with pytest.raises(UserError, match="may lie in the other"):
        convert(own / "records.json", target, to, image_folder=own / "images", images=folder / images)
    assert not folder.exists()


@pytest.mark.parametrize(
    "extra", [{"note": "a\ud800"}, {"tags": ["a", "b\ud800"]}, {"a\ud800": "x"}], ids=["text", "list", "name"]
)
@pytest.mark.parametrize("to", ["parquet", "arrow", "datasets", "csv"])
def test_half_a_surrogate_pair_is_refused_by_name(to: str, extra: dict[str, Any], own: Path) -> None:
    path = write(own, [talk(Q, A, id="good"), talk(Q, A, id="bad", **extra)])
    with pytest.raises(DataError, match=r"record 1 \(id 'bad', line 2\).*--drop"):
        convert(path, own / "new", to)
    assert not (own / "new").exists()


def test_a_number_that_is_none_goes_into_tables_and_into_no_json(own: Path) -> None:
    path = write(own, [talk(Q, A, score=float("nan")), talk(Q, A, score=0.5)])
    convert(path, own / "new.parquet", "parquet")
    first, second = (record.extra for record in read_records(own / "new.parquet", extra=extras_of))
    assert first is not None and first["score"] != first["score"] and second == {"score": 0.5}
    for to in ("json", "webdataset"):
        with pytest.raises(DataError, match=r"record 0 .*score: .*--drop score"):
            convert(own / "new.parquet", own / "new", to)
