from __future__ import annotations

import base64
import io
import json
import tarfile

import pytest

from tinyllava_fast.data.records import read_records
from tinyllava_fast.errors import DataError


def write(path, *members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def talk(question, **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "a"}]
    return json.dumps({"conversations": turns, **more}).encode()


def test_shards(tmp_path, picture, levels):
    uri = "data:image/png;base64," + base64.b64encode(picture(9)).decode()
    asked = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}]}]
    write(
        tmp_path / "b",
        ("d/0004.json", json.dumps({"messages": [*asked, {"role": "assistant", "content": "a"}]}).encode()),
    )
    write(
        tmp_path / "a",
        ("d/0000.jpg", picture(1, "PNG")),
        ("d/0000.json", talk("<image>\nq", image="x/y.jpg", id="own")),
        ("d/0001.txt", "é".encode()),
        ("d/0001.webp", picture(2)),
        ("d/0001.__key__", b"0001"),
        ("d/0002.a.png", picture(3)),
        ("d/0002.b.png", picture(4)),
        ("d/0002.question.txt", b"<image><image>same ?"),
        ("d/0002.answer.txt", b"no"),
        ("d/0003.json", talk("q")),
    )
    records = list(read_records(tmp_path))
    assert [r.id for r in records] == ["own", "d/0001", "d/0002", "d/0003", "d/0004"]
    assert [levels(tmp_path, record) for record in records] == [[1], [2], [3, 4], [], [9]]
    assert [r.turns for r in records] == [
        (("<image>\nq", "a"),),
        (("<image>", "é"),),
        (("<image><image>same ?", "no"),),
        (("q", "a"),),
        (("<image>", "a"),),
    ]
    assert records[3].where == "record 3 (id 'd/0003', a, a: d/0003)"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.json", b"{")], r"x: 1.json: not JSON"),
        ([("1.json", b"[]")], r"x: 1.json: expected a JSON object"),
        ([("1.png", b"x")], r"record 0 \(id '1', x: 1\): conversations: missing"),
        ([("1.txt", b"\xff")], r"x: 1.txt: not UTF-8 text"),
        ([("1.png", b""), ("2.txt", b"x")], r"record 0 \(id '1', x: 1\): conv"),
    ],
    ids=range(5),
)
def test_faults_name_the_member(tmp_path, members, message):
    with pytest.raises(DataError, match=message):
        list(read_records(write(tmp_path / "x", *members)))


def test_damaged_archives(tmp_path, picture, levels):
    path = write(tmp_path / "x", ("1.png", picture(1)), ("1.txt", b"one"), ("2.png", picture(2)), ("2.txt", b"two"))
    records = list(read_records(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:600])
    with pytest.raises(DataError, match=r"x at \d+, \d+: cannot be read \(the archive has become shorter\)"):
        levels(path, records[1])
    path.unlink()
    with pytest.raises(DataError, match="the file is missing"):
        levels(path, records[1])
    path.write_bytes(b"\x1f\x8b" + whole)
    with pytest.raises(DataError, match="x: a gzip archive; unpack it"):
        list(read_records(path))


def test_what_webdataset_writes(tmp_path, picture, levels):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "x")) as sink:
        sink.write({"__key__": "1", "png": picture(8), "txt": "eight"})
    [record] = read_records(tmp_path / "x")
    assert levels(tmp_path / "x", record) == [8] and record.turns == (("<image>", "eight"),)
