"""Records one after the other: every form of shards, from every place on."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import islice

import pytest

from tinyllava_fast.data.formats._base import RECORD_FORMATS
from tinyllava_fast.data.record import Record
from tinyllava_fast.data.records import Refused, read_records
from tinyllava_fast.data.stream import Position, RecordStream
from tinyllava_fast.errors import CheckpointError, DataError

SIZES = (5, 1, 7)


def row(number):
    talk = [{"from": "human", "value": f"wörd {number} ?"}, {"from": "gpt", "value": f"{number} ."}]
    return {"id": f"r{number}", "conversations": talk}


def write_json(path, rows):
    path.write_text("\ufeff" + json.dumps(rows, indent=1, ensure_ascii=False))


def write_jsonl(path, rows):
    path.write_text("\ufeff\n" + "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))


def write_csv(path, rows):
    lines = [f"{row['id']},{row['conversations'][0]['value']},{row['conversations'][1]['value']}" for row in rows]
    path.write_text("\n".join(["id,question,answer", *lines]))


def write_tar(path, rows):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for number, entry in enumerate(rows):
            stem = f"{entry['id']}ü" + "long" * 30 * (number % 2)  # a header of its own for the name
            files = {"json": json.dumps(entry).encode(), "_note": b"left out"}
            for ending, content in files.items():
                info = tarfile.TarInfo(f"{stem}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def write_parquet(path, rows):
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path, row_group_size=3)


def write_arrow(path, rows):
    pa = pytest.importorskip("pyarrow")
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS = {
    "json": write_json,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "tar": write_tar,
    "parquet": write_parquet,
    "arrow": write_arrow,
}


@pytest.fixture(params=sorted(WRITERS))
def shards(request, tmp_path):
    """A folder of three shards."""
    folder, first = tmp_path / "shards", 0
    folder.mkdir()
    for number, size in enumerate(SIZES):
        WRITERS[request.param](folder / f"{number}.shard", [row(n) for n in range(first, first + size)])
        first += size
    return folder


def told(records):
    assert all(isinstance(record, Record) for record in records)
    return [(record.id, record.turns, record.line) for record in records]


def test_each_pass_has_all_records_and_goes_on_from_anywhere(shards):
    stream = RecordStream(str(shards), 3, 0)
    found = list(islice(stream.records(Position()), 5 * sum(SIZES)))
    records = told([record for _, record in found])
    passes = [records[at : at + sum(SIZES)] for at in range(0, len(records), sum(SIZES))]
    whole = told(list(read_records(shards)))
    orders = [[ids.index(f"r{first}") for first in (0, 5, 6)] for ids in ([record[0] for record in p] for p in passes)]
    for part in passes:
        assert sorted(part) == sorted(whole)
    assert len({tuple(order) for order in orders}) > 2
    again = RecordStream(str(shards), 3, 0)
    places = [Position(), *(at for at, _ in found)]
    for number, at in enumerate(places[: 2 * sum(SIZES) + 1]):
        at = Position.of(json.loads(json.dumps(at.as_list())), "state")
        rest = list(islice(again.records(at), 6))
        assert [after for after, _ in rest] == places[number + 1 : number + 7], at
        assert told([record for _, record in rest]) == records[number : number + 6]
    share = [stream.passes(at) for at in places]
    assert share == sorted(share) and share[0] == 0 and 4 < share[-1] <= 5


def test_a_folder_of_datasets_has_its_files_as_shards(tmp_path):
    names = [f"data-{number}.arrow" for number in range(2)]
    for number, name in enumerate(names):
        write_arrow(tmp_path / name, [row(n) for n in range(3 * number, 3 * number + 3)])
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (tmp_path / "dataset_info.json").write_text("{}")
    stream = RecordStream(str(tmp_path), 0, 0)
    found = list(islice(stream.records(Position()), 6))
    assert len(stream) == 2 and sorted(record.id for _, record in found) == [f"r{n}" for n in range(6)]
    assert next(stream.records(found[3][0]))[1] == found[4][1]


def test_refused_records_keep_their_places(tmp_path):
    rows = [json.dumps(row(number)) for number in range(6)]
    rows[1], rows[4] = "{", json.dumps({"id": "x", "conversations": 3})
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    stream = RecordStream(str(tmp_path / "a.jsonl"), 0, 0)
    found = list(islice(stream.records(Position()), 12))
    refused = [number for number, (_, record) in enumerate(found) if isinstance(record, Refused)]
    assert refused == [1, 4, 7, 10] and "record 4 (id 'x', line 5)" in str(found[4][1])
    rest = [record for _, record in islice(stream.records(found[2][0]), 3)]
    assert str(rest[1]) == str(found[4][1]) and [rest[0], rest[2]] == [found[3][1], found[5][1]]


def test_images_in_shards_are_those_of_the_record(tmp_path):
    image = b"\x89PNG"
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for number in range(3):
                files = {"png": image + b"%d%d" % (shard, number), "question.txt": b"what ?", "answer.txt": b"it ."}
                for ending, content in files.items():
                    info = tarfile.TarInfo(f"{shard}{number}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    stream = RecordStream(str(tmp_path), 0, 0)
    first = list(islice(stream.records(Position()), 4))
    _, record = next(stream.records(first[-1][0]))
    name, file, address, place = json.loads(record.images[0][1:])
    content = RECORD_FORMATS.get(name).image(tmp_path / file, tuple(address), tuple(place))
    assert content == image + record.id.encode()


def test_what_is_no_stream(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty.jsonl: holds no records"):
        next(RecordStream(str(tmp_path / "empty.jsonl"), 0, 0).records(Position()))
    with pytest.raises(DataError, match=r"none.jsonl: cannot read the records: No such file"):
        RecordStream(str(tmp_path / "none.jsonl"), 0, 0)
    for bad in (3, [1, 2], [1, 2, "3"], [1, 2, True]):
        with pytest.raises(CheckpointError, match="state: expected a place in a stream"):
            Position.of(bad, "state")
