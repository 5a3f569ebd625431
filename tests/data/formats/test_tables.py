"""Parquet, Arrow, folders of Hugging Face datasets, CSV."""

from __future__ import annotations

import json
import random

import pytest

from tinyllava_fast.data.records import read_records
from tinyllava_fast.errors import DataError

pa = pytest.importorskip("pyarrow")
ipc = pytest.importorskip("pyarrow.ipc")
parquet = pytest.importorskip("pyarrow.parquet")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def rows_of(picture, count=10):
    """Every third has no image, every fourth names a file in place of bytes."""
    rows = []
    for number in range(count):
        image = {"bytes": picture(number), "path": None} if number % 4 else {"bytes": None, "path": f"{number}.png"}
        rows.append({"image": image if number % 3 else None, "question": f"q{number}", "answer": str(number)})
    return rows


def table_of(picture, count=10):
    rows = rows_of(picture, count)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    types = {"image": IMAGE, "question": pa.string(), "answer": pa.string()}
    return pa.table({name: pa.array(columns[name], types[name]) for name in columns})


def write_stream(path, table, rows=3):
    with ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def write(kind, folder, table):
    """Write the table, in several parts; return the path."""
    path = folder / "source"
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=3)
    elif kind == "arrow stream":
        write_stream(path, table)
    elif kind == "arrow file":
        with ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    elif kind == "saved":
        path.mkdir()
        files = []
        for number in range(2):
            files.append({"filename": f"data-{number:05}-of-00002.arrow"})
            write_stream(path / files[-1]["filename"], table.slice(number * 5, 5))
        (path / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "x"}))
        (path / "dataset_info.json").write_text("{}")
    else:
        path.mkdir()
        for number in range(2):
            parquet.write_table(table.slice(number * 5, 5), path / f"part-{number}", row_group_size=3)
        (path / "README.md").write_text("what this is\n")
    return path


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "arrow file", "saved", "shards"])
def test_tables(tmp_path, picture, levels, kind):
    path = write(kind, tmp_path, table_of(picture))
    for number in range(0, 10, 4):
        (tmp_path / f"{number}.png").write_bytes(picture(100 + number))
    records = list(read_records(path))
    assert [r.turns[0] for r in records] == [((f"<image>\nq{n}" if n % 3 else f"q{n}"), str(n)) for n in range(10)]
    wanted = [[n if n % 4 else 100 + n] if n % 3 else [] for n in range(10)]
    order = list(range(10))
    random.Random(0).shuffle(order)
    for number in order:
        assert levels(path, records[number], tmp_path) == wanted[number]
    assert all(len(image) < 300 for record in records for image in record.images)
    assert records[7].where.startswith("record 7 (id '7', ") and "row " in records[7].where


def test_messages_with_parts_and_a_list_of_images(tmp_path, picture, levels):
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    message = pa.struct([("role", pa.string()), ("content", pa.list_(part))])
    asked = [{"type": "image", "text": None}, {"type": "image", "text": None}, {"type": "text", "text": "which ?"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    images = [[{"bytes": picture(7), "path": None}, {"bytes": picture(8), "path": None}], None, []]
    plain = [{"role": "user", "content": [asked[2]]}, messages[1]]
    table = pa.table(
        {
            "images": pa.array(images, pa.list_(IMAGE)),
            "messages": pa.array([messages, plain, plain], pa.list_(message)),
            "source": ["x"] * 3,
        }
    )
    parquet.write_table(table, tmp_path / "x")
    records = list(read_records(tmp_path / "x"))
    assert records[0].turns == (("<image>\n<image>\nwhich ?", "a"),) and records[0].interleaved
    assert levels(tmp_path / "x", records[0]) == [7, 8]
    assert [r.images for r in records[1:]] == [(), ()]


def test_a_plain_column_of_bytes(tmp_path, picture, levels):
    table = pa.table({"image": [picture(5), picture(6)], "caption": ["five", "six"]})
    parquet.write_table(table, tmp_path / "x")
    records = list(read_records(tmp_path / "x"))
    assert [levels(tmp_path / "x", record) for record in records] == [[5], [6]]
    assert records[1].turns == (("<image>", "six"),)


def test_faults_name_file_row_and_field(tmp_path, picture):
    rows = rows_of(picture, 3)
    rows[2]["answer"] = None
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x")
    with pytest.raises(DataError, match=r"x: record 2 \(id '2', row 2\): answer: is null"):
        list(read_records(tmp_path / "x"))
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, part in (("a", rows[:2]), ("b", rows[2:])):
        parquet.write_table(pa.Table.from_pylist(part), folder / name)
    with pytest.raises(DataError, match=r"shards: record 2 \(id '2', b, row 0\): answer: is null"):
        list(read_records(folder))


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "arrow file"])
def test_a_file_that_is_cut_off(tmp_path, picture, kind):
    path = write(kind, tmp_path, table_of(picture))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="source: "):
        list(read_records(path))


def test_folders_that_do_not_say_what_to_read(tmp_path, picture):
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"holds the splits train, test; name one of them: .*splits/train"):
        list(read_records(splits))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    with pytest.raises(DataError, match="a folder without records; it holds nothing"):
        list(read_records(mixed))
    parquet.write_table(table_of(picture), mixed / "a")
    write_stream(mixed / "b", table_of(picture))
    with pytest.raises(DataError, match="records in several forms, arrow and parquet"):
        list(read_records(mixed))
    assert len(list(read_records(f"{mixed}/[a]"))) == 10
    with pytest.raises(DataError, match="no file fits this pattern"):
        list(read_records(f"{mixed}/*.parquet"))


def test_what_datasets_writes(tmp_path, picture, levels):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    table = pa.Table.from_pylist(rows_of(picture)[1:4], schema=features.arrow_schema)
    info = datasets.DatasetInfo(features=features)
    made = datasets.Dataset(datasets.table.InMemoryTable(table), info=info, fingerprint="x")
    made.save_to_disk(tmp_path / "disk")
    made.to_parquet(tmp_path / "x")
    for path in (tmp_path / "disk", tmp_path / "x"):
        records = list(read_records(path))
        assert [levels(path, record) for record in records] == [[1], [2], []]
