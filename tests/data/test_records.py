from __future__ import annotations

import json
import random

import pytest

from tinyllava_fast.data.formats import json_text
from tinyllava_fast.data.records import read_records
from tinyllava_fast.errors import DataError

GOOD = {"id": "a", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]}


def write(tmp_path, text, name="data.json"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_list_and_lines_give_the_same(tmp_path):
    rows = [GOOD, {**GOOD, "id": 7, "image": "a.png"}, {"conversations": GOOD["conversations"]}]
    as_list = list(read_records(write(tmp_path, json.dumps(rows, indent=1))))
    lines = "\n\n".join(json.dumps(row) for row in rows)
    as_lines = list(read_records(write(tmp_path, lines, "data.jsonl")))
    assert [r.id for r in as_list] == ["a", "7", "2"] == [r.id for r in as_lines]
    assert [r.images for r in as_list] == [(), ("a.png",), ()]
    assert as_list[0].turns == (("q", "x"),)
    assert [r.line for r in as_lines] == [1, 3, 5]
    assert [r.line for r in as_list] == [
        i for i, t in enumerate(json.dumps(rows, indent=1).split("\n"), 1) if t == " {"
    ]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_streaming_crosses_chunk_borders(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_text, "_CHUNK", chunk)
    rows = [{**GOOD, "id": f"é{i}\n"} for i in range(20)]
    assert [r.id for r in read_records(write(tmp_path, json.dumps(rows, indent=2)))] == [f"é{i}\n" for i in range(20)]


def test_a_byte_order_mark_and_a_leading_answer_are_accepted(tmp_path):
    row = {"conversations": [{"from": "gpt", "value": "hi"}, *GOOD["conversations"]]}
    [record] = read_records(write(tmp_path, "\ufeff" + json.dumps([row])))
    assert record.turns == (("q", "x"),)


def without(key, **more):
    return {k: v for k, v in {**GOOD, **more}.items() if k != key}


def messages(*pairs):
    return {"id": "bad", "conversations": [{"from": who, "value": value} for who, value in pairs]}


GPT = {"from": "gpt", "value": "a"}
BAD = [
    ("[]", r"holds no records"),
    ("", r"holds no records"),
    ('[{"id": 1},\n {"id": }]', r"line 1, record 0 \(|record 0 \(id '1', line 1\): conversations: missing"),
    (
        f"[{json.dumps(GOOD)},\n\n{{'id'}}]",
        r"line 3, record 1: malformed JSON: Expecting property name.*mend or remove",
    ),
    (f"[{json.dumps(GOOD)}\n{json.dumps(GOOD)}]", r"line 2, record 1: malformed JSON: expected ',' or '\]'"),
    (f"[{json.dumps(GOOD)}", r"line 1, record 1: malformed JSON"),
    (f"[{json.dumps(GOOD)},]", r"line 1, record 1: malformed JSON"),
    (f"[{json.dumps(GOOD)}] x", r"record 1: malformed JSON: text after the end"),
    (f"{json.dumps(GOOD)}\n{{", r"line 2, record 1: malformed JSON"),
    ("[3]", r"record 0 \(id '0', line 1\): record: expected an object with 'conversations', got 3"),
    (json.dumps([without("conversations", conversation=[])]), r"conversations: missing; did you mean 'conversation'\?"),
    (
        json.dumps([{**GOOD, "conversations": []}]),
        r'conversations: expected a list of \{"from": "human" \| "gpt", "value": text\} or \{"role".*, at least',
    ),
    (json.dumps([{**GOOD, "conversations": "hi"}]), r"conversations: expected a list"),
    (
        json.dumps([{**GOOD, "image": ["a.png", 3]}]),
        r"image\[1\]: expected a path, got 3",
    ),
    (
        json.dumps([messages(("narrator", "q"), ("gpt", "a"))]),
        r"conversations\[0\].from: expected 'human' or 'gpt' \('user' or 'assistant'\), .*, got 'narrator'",
    ),
    (json.dumps([{**GOOD, "conversations": ["q"]}]), r"conversations\[0\].from: expected 'human' or 'gpt' .*, got 'q'"),
    (
        json.dumps([messages(("human", "q"), ("gpt", None))]),
        r"conversations\[1\].value: expected text, or a list of parts, got",
    ),
    (
        json.dumps([messages(("human", "q"), ("human", "r"))]),
        r"conversations\[1\].from: two messages of 'human' in a row",
    ),
    (
        json.dumps([GOOD, messages(("human", "q"), ("gpt", "a"), ("human", "r"))]),
        r"record 1 \(id 'bad', line 1\): conversations: 2 questions but 1 answers",
    ),
    (json.dumps([messages(("human", "q"), ("gpt", "\ud83d"))]), r"\[1\].value: contains half of a surrogate pair"),
    (json.dumps([messages(("gpt", "a"))]), r"conversations: no question"),
    (
        json.dumps([without("conversations", messages=[{"role": "user"}])]),
        r"messages\[0\].value: expected text, or a list of parts, got null",
    ),
    (
        json.dumps([{**GOOD, "conversations": [{"role": "tool", "content": "q"}]}]),
        r"conversations\[0\].role: expected .*, got 'tool'; calls of tools cannot be learnt",
    ),
    (json.dumps([without("conversations")]), r"conversations: missing; The record has 'id'; 'conv.*, a list of \{"),
    ('[{"id": 1, "id": 2}]', r"line 1, record 0: malformed JSON: the field 'id' stands twice"),
    ('{"conversations": [{"from": "human", "from": "gpt"}]}', r"line 1, record 0: .*the field 'from' stands twice"),
    ("[" + "[" * 100_000, r"line 1, record 0: malformed JSON: lists or objects are nested too deep"),
    ('{"id": ' + "[" * 100_000, r"line 1, record 0: malformed JSON: lists or objects are nested too deep"),
    ('[{"id": ' + "9" * 5000 + "}]", r"record 0: malformed JSON: a number has more digits"),
    ('{\n"id": 1}', r"line 1, record 0: malformed JSON.*each line holds one whole record"),
    *(
        (json.dumps([{**GOOD, "id": bad}]), r"record 0 .*: id: expected text")
        for bad in (True, [], {}, [None], "\ud83d")
    ),
    *(
        (json.dumps([{**GOOD, name: "a.png"}]), rf"unknown field '{name}'; did you mean 'image'\?")
        for name in ("img", "imgae", "Image", "image_path", "file_name", "picture", "image_id", "imagess")
    ),
    (json.dumps([{**GOOD, "video": "a.mp4"}]), r"video: videos cannot be read; remove this record"),
    (json.dumps([{**GOOD, "image": ""}]), r"image: expected a path, got ''"),
    (json.dumps([{**GOOD, "image": "a\0b"}]), r"image: expected a path, .*no file can have this name"),
    (json.dumps([{**GOOD, "images": "a.png"}]), r"images: expected a list of paths, got 'a.png'"),
    (json.dumps([{**GOOD, "images": ["a"], "image": "b"}]), r"images: given beside 'image'"),
    *(
        (
            json.dumps([{"conversations": [{"from": "human", "value": "q", name: "a.png"}, GPT]}]),
            rf"conversations\[0\]: it names '{name}', which belongs to the record",
        )
        for name in ("image", "images", "Image", "video", "image_path", "file_name")
    ),
    (
        json.dumps([{"conversations": [{"from": "human", "value": "q"}, {**GPT, "image": "a.png"}]}]),
        r"conversations\[1\]: it names 'image'",
    ),
]


def test_null_is_not_given_and_other_fields_are_ignored(tmp_path):
    row = {**GOOD, "id": None, "image": None, "images": None, "img": None, "source": "x", "width": 3}
    row["conversations"] = [{**message, "image": None, "weight": 1} for message in GOOD["conversations"]]
    [record] = read_records(write(tmp_path, json.dumps([row])))
    assert (record.id, record.images) == ("0", ())
    [record] = read_records(write(tmp_path, json.dumps([{**GOOD, "image": "a.png", "image_id": 7, "file_name": "b"}])))
    assert (record.images, record.interleaved) == (("a.png",), False)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-8-sig", None),
        ("cp1252", "not UTF-8 text (invalid continuation byte in line 2, byte "),
        ("utf-16", "not UTF-8 text (it is UTF-16); save it as UTF-8"),
    ],
)
def test_encodings(tmp_path, name, encoding, said):
    rows = [GOOD, {**GOOD, "id": "caf\u00e9"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path = tmp_path / name
    text = "[" + ",\r\n".join(lines) + "]\r\n" if name == "data.json" else "\r\n".join(lines)
    path.write_bytes(text.encode(encoding))
    if said is None:
        assert [(r.id, r.line) for r in read_records(path)] == [("a", 1), ("caf\u00e9", 2)]
    else:
        with pytest.raises(DataError) as error:
            list(read_records(path))
        assert str(error.value).startswith(f"{path}: {said}")


@pytest.mark.parametrize("text,message", BAD, ids=range(len(BAD)))
def test_bad_records(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(DataError, match=message) as error:
        list(read_records(path))
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_damaged_files_give_a_data_error_or_records(tmp_path, name):
    rows = [{**GOOD, "id": f"\u00e9{i}", "image": "a.png"} for i in range(4)]
    whole = (json.dumps(rows) if name == "data.json" else "\n".join(map(json.dumps, rows))).encode()
    rng = random.Random(0)
    failed = 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(content))
            content[at : at + rng.randint(0, 3)] = bytes(rng.randrange(256) for _ in range(rng.randint(0, 2)))
        path = tmp_path / name
        path.write_bytes(content)
        try:
            assert list(read_records(path))
        except DataError as error:
            assert str(error).startswith(str(path))
            failed += 1
    assert failed > 100


def test_unreadable_files(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.json: cannot read the records: No such file.*check the path"):
        list(read_records(tmp_path / "nowhere.json"))
    (tmp_path / "latin.json").write_bytes(b'[{"id": "\xe9"}]')
    with pytest.raises(DataError, match="not UTF-8 text"):
        list(read_records(tmp_path / "latin.json"))
