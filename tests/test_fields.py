"""Every reader of typed fields against every kind of value, and files as people's tools save them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinyllava_fast.errors import CheckpointError, DataError
from tinyllava_fast.fields import (
    DECODER,
    Fields,
    decode,
    fault,
    is_number,
    is_text,
    read_json,
    read_jsonl,
    read_object,
    read_objects,
    read_text,
    shown,
)

HALF = "\ud800"
DEEP: list[Any] = []
for _ in range(3000):
    DEEP = [DEEP]
VALUES: dict[str, Any] = {
    "text": "cat",
    "empty": "",
    "blank": " \n",
    "half a pair": f"a{HALF}",
    "nul": "a\0b",
    "long": "x" * 5000,
    "zero": 0,
    "seven": 7,
    "minus": -1,
    "huge": 10**400,
    "half": 0.5,
    "nan": math.nan,
    "inf": math.inf,
    "true": True,
    "false": False,
    "no items": [],
    "texts": ["a", "b"],
    "text and null": ["a", None],
    "text and half a pair": ["a", HALF],
    "text and 1": ["a", 1],
    "no fields": {},
    "object": {"a": 1},
    "objects": [{"a": 1}, {}],
    "deep": DEEP,
}
READERS: dict[str, tuple[Callable[[Fields], Any], set[str]]] = {
    "text": (lambda f: f.text("x"), {"text", "nul", "long"}),
    "text or empty": (lambda f: f.text("x", empty=True), {"text", "nul", "long", "empty", "blank"}),
    "word": (lambda f: f.word("x"), {"text", "nul", "long", "zero", "seven", "minus", "half"}),
    "words": (lambda f: f.words("x"), {"texts", "text and 1"}),
    "word or words": (
        lambda f: f.words("x", single=True),
        {"text", "nul", "long", "zero", "seven", "minus", "half", "texts", "text and 1"},
    ),
    "path": (lambda f: f.path("x"), {"text"}),
    "paths": (lambda f: f.paths("x"), {"text", "no items", "texts"}),
    "list of paths": (lambda f: f.paths("x", single=False), {"no items", "texts"}),
    "identifier": (lambda f: f.identifier("x"), {"text", "nul", "long", "zero", "seven", "minus", "huge"}),
    "integer": (lambda f: f.integer("x"), {"zero", "seven", "minus", "huge"}),
    "natural": (lambda f: f.integer("x", least=0), {"zero", "seven", "huge"}),
    "digit": (lambda f: f.integer("x", most=9), {"zero", "seven", "minus"}),
    "number": (lambda f: f.number("x"), {"zero", "seven", "minus", "half"}),
    "positive": (lambda f: f.number("x", least=0.1), {"seven", "half"}),
    "boolean": (lambda f: f.boolean("x"), {"true", "false"}),
    "one_of": (lambda f: f.one_of("x", ["cat", "dog"]), {"text"}),
    "texts": (lambda f: f.texts("x"), {"texts"}),
    "texts or none": (lambda f: f.texts("x", empty=True), {"texts", "no items"}),
    "items": (
        lambda f: f.items("x"),
        {"texts", "text and null", "text and half a pair", "text and 1", "objects", "deep"},
    ),
    "mapping": (lambda f: f.mapping("x").values, {"no fields", "object"}),
    "mappings": (lambda f: [m.values for m in f.mappings("x")], {"objects"}),
}
CHANGED: dict[tuple[str, str], Any] = {
    ("words", "text and 1"): ["a", "1"],
    ("word or words", "text and 1"): ["a", "1"],
    **{
        ("word or words", name): [str(VALUES[name])]
        for name in ("text", "nul", "long", "zero", "seven", "minus", "half")
    },
    ("paths", "text"): ["cat"],
    **{("word", name): str(VALUES[name]) for name in ("zero", "seven", "minus", "half")},
}


@pytest.mark.parametrize("reader", READERS)
def test_each_reader_takes_its_kinds_and_names_what_else_it_found(reader: str) -> None:
    read, accepted = READERS[reader]
    for kind, found in VALUES.items():
        fields = Fields({"x": found}, "data.json, line 3")
        if kind in accepted:
            value, wanted = read(fields), CHANGED.get((reader, kind), found)
            assert value == wanted and (type(value) is type(wanted) or reader in ("number", "positive")), kind
            continue
        with pytest.raises(DataError) as error:
            read(fields)
        said = str(error.value)
        assert said.startswith("data.json, line 3: x") and "expected " in said and "got " in said, kind
        assert is_text(said) and len(said) < 250, kind


@pytest.mark.parametrize("reader", READERS)
def test_a_missing_and_a_null_field(reader: str) -> None:
    read = READERS[reader][0]
    with pytest.raises(DataError, match=r"^f: no field 'x'; it has 'y'$"):
        read(Fields({"y": 1}, "f"))
    with pytest.raises(DataError, match=r"^f: x: is null; give it a value$"):
        read(Fields({"x": None}, "f"))


@pytest.mark.parametrize("values", [{}, {"x": None}])
@pytest.mark.parametrize("default", [None, "d"])
def test_a_default_stands_for_a_missing_and_a_null_field(values: dict[str, Any], default: str | None) -> None:
    f = Fields(values, "f")
    found = [
        f.text("x", default),
        f.word("x", default),
        f.words("x", default),
        f.path("x", default),
        f.paths("x", default),
        f.identifier("x", default),
        f.integer("x", default),
        f.number("x", default),
        f.boolean("x", default),
        f.one_of("x", ["a"], default),
        f.texts("x", default),
        f.items("x", default),
        f.mapping("x", default),
        f.mappings("x", default),
    ]
    assert found == [default] * len(found)
    assert "x" not in f


def test_an_error_lists_a_few_of_many_fields() -> None:
    with pytest.raises(DataError) as error:
        Fields({f"{HALF}{i}": 1 for i in range(10_000)}, "f").text("x")
    assert len(str(error.value)) < 250 and str(error.value).endswith("'\\ud80011', ...")


def test_where_grows_with_the_path_and_the_error_class_is_kept() -> None:
    fields = Fields({"a": {"b": [{}, {"c": 1}]}}, "m.json", CheckpointError)
    with pytest.raises(CheckpointError, match=r"^m.json: a: b\[1\]: c: expected text that is not empty, got 1$"):
        fields.mapping("a").mappings("b")[1].text("c")
    with pytest.raises(CheckpointError, match=r"^m.json: a: b\[0\]: no field 'c'; it has none$"):
        fields.mapping("a").mappings("b")[0].text("c")
    with pytest.raises(CheckpointError, match=r"^m.json: expected a JSON object, got \[1\]$"):
        Fields.of([1], "m.json", CheckpointError)


@pytest.mark.parametrize("path", ["a" * 256, "é" * 128, "/".join(["ab"] * 2000), "a\0"])
def test_paths_that_no_file_can_have(path: str) -> None:
    with pytest.raises(DataError, match="no file can have this name"):
        Fields({"x": path}, "f").path("x")


@pytest.mark.parametrize("path", ["a" * 255, "é" * 127, "../b.png", "/abs/c.png", "中" * 85])
def test_paths_that_a_file_can_have(path: str) -> None:
    assert Fields({"x": path}, "f").path("x") == path


def test_unknown_fields_come_with_the_nearest_name() -> None:
    found = Fields({"image": 1, "imgae": 2, "zzz": 3}, "f").unknown(["image", "text"])
    assert found == {"imgae": "did you mean 'image'? Known: image, text", "zzz": "Known: image, text"}


def test_true_is_no_number_in_words() -> None:
    with pytest.raises(DataError, match=r"x: expected text or a number, got true; write the word in quotation marks"):
        Fields({"x": True}, "f").word("x")


GOOD = '{"é": "中"}\n'
ENCODINGS = [
    (GOOD.encode(), None),
    (GOOD.encode("utf-8-sig"), None),
    (GOOD.replace("\n", "\r\n").encode("utf-8-sig"), None),
    ('{"é": 1}'.encode("cp1252"), "not UTF-8 text (invalid continuation byte in line 1, byte 2 of the file); save it"),
    (
        b"\n\n" + '{"é": 1}'.encode("cp1252"),
        "(invalid continuation byte in line 3, byte 4 of the file); save it",
    ),
    (GOOD.encode("utf-16"), "not UTF-8 text (it is UTF-16); save it as UTF-8"),
    (GOOD.encode("utf-16-be"), "not UTF-8 text (invalid continuation byte in line 1, byte 5 of the file)"),
    (b'{"a": 1}'.decode().encode("utf-16-le"), "it seems to be UTF-16 or no text at all; save it as UTF-8"),
    (b"PK\x03\x04\0\0\0", "it seems to be UTF-16 or no text at all"),
    (b'{"a": "\xed\xa0\x80"}', "not UTF-8 text (invalid continuation byte in line 1, byte 7 of the file)"),
    (b"<!DOCTYPE html><html></html>", "it seems to be a web page; download the file again"),
    (b'{"a": 1', "not JSON (Expecting ',' delimiter"),
    (b'{"a": 1, "b": {"c": 1, "c": 1}}', "the field 'c' stands twice in one object; keep one of them"),
    (b'{"\\ud800": 1, "\\ud800": 1}', "the field '\\ud800' stands twice in one object"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    (b'{"a": ' + b"9" * 5000 + b"}", "more digits than can be read"),
    (b'{"a": 1}{"a": 2}', "Extra data"),
    (b"\xef\xbb\xbf\xef\xbb\xbf{}", "a byte order mark stands in the middle of the file; remove it"),
]


@pytest.mark.parametrize(("data", "said"), ENCODINGS, ids=range(len(ENCODINGS)))
@pytest.mark.parametrize("read", [read_json, lambda p: next(iter(read_jsonl(p)))[1].values], ids=["json", "jsonl"])
def test_files_as_tools_save_them(tmp_path: Path, read: Callable[[Path], Any], data: bytes, said: str | None) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    if said is None:
        assert read(path) == {"é": "中"}
        return
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value).startswith(str(path)) and said in str(error.value)


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b" \n\n"])
def test_an_empty_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    assert list(read_jsonl(path)) == []
    with pytest.raises(DataError, match=r"x.json: not JSON \(.*it is empty; download or write it again"):
        read_json(path)


def test_the_line_and_byte_that_are_not_utf8_count_from_the_start_of_a_long_file(tmp_path: Path) -> None:
    path, line = tmp_path / "x.jsonl", b'{"a": "' + b"x" * 91 + b'"}\n'
    path.write_bytes(line * 3000 + b'{"a": "\xe9"}\n')
    with pytest.raises(DataError, match=r"in line 3001, byte 303007 of the file"):
        list(read_jsonl(path))


def test_lines_are_numbered_and_each_is_an_object(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n \n{"a": 2}')
    assert [(number, f.where, f.integer("a")) for number, f in read_jsonl(path)] == [
        (2, f"{path}, line 2", 1),
        (4, f"{path}, line 4", 2),
    ]
    path.write_text('{"a": 1}\n[1]\n')
    with pytest.raises(DataError, match=r"x.jsonl, line 2: expected a JSON object, got \[1\]"):
        list(read_jsonl(path))
    path.write_text('{"a": 1}\n\ufeff{"a": 1}\n')
    with pytest.raises(DataError, match=r"line 2: .*a byte order mark stands in the middle"):
        list(read_jsonl(path))


def test_a_file_of_one_object_and_one_of_a_list(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('[{"a": 1}, {"a": "x"}]')
    with pytest.raises(DataError, match=r"x.json, record 2: a: expected a whole number, got 'x'"):
        [f.integer("a") for f in read_objects(path)]
    with pytest.raises(DataError, match=r"x.json: expected a JSON object, got \["):
        read_object(path)
    path.write_text('{"a": 1}')
    assert read_object(path).integer("a") == 1
    with pytest.raises(DataError, match=r"x.json: expected a JSON list of objects, got \{'a': 1\}"):
        read_objects(path)
    path.write_text("[{}, null]")
    with pytest.raises(DataError, match=r"x.json, record 2: expected a JSON object, got null"):
        read_objects(path)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for read in (read_text, read_json, lambda p: list(read_jsonl(p))):
        with pytest.raises(CheckpointError if read is read_text else DataError, match="cannot be read: "):
            read(tmp_path, CheckpointError) if read is read_text else read(tmp_path / "nowhere")


def test_values_can_be_read_one_by_one() -> None:
    assert DECODER.raw_decode('{"a": 1} {"b": 2}', 9) == ({"b": 2}, 17)
    with pytest.raises(ValueError) as error:
        DECODER.raw_decode('{"a": 1, "a": 2}')
    assert fault(error.value) == "the field 'a' stands twice in one object; keep one of them"
    with pytest.raises(DataError, match=r"^here: not JSON .*in line 2, character 7"):
        decode('{\n  "a" 1}', "here")


def test_shown_is_short_and_can_be_written() -> None:
    values = [DEEP, 10**5000, HALF * 500, ["x" * 50] * 1000, {"a": HALF}, b"\xff"]
    assert all(len(shown(v)) <= 80 and is_text(shown(v)) for v in values)
    assert shown("é") == "'é'" and shown(10**5000) == "int"


def test_what_counts_as_a_number() -> None:
    assert [is_number(v) for v in (1, -0.5, 0, True, math.nan, -math.inf, 10**400, "1", None)] == [True] * 3 + [
        False
    ] * 6


def test_json_escapes_can_spell_half_of_a_pair() -> None:
    assert is_text(json.loads('"\\ud83d\\ude00"')) and not is_text(json.loads('"\\ud83d"'))


def test_a_whole_number_is_the_same_word_in_any_notation():
    values = {"a": 3.0, "b": 1e3, "c": -0.0, "d": 2.5, "e": 1e300, "f": [1.0, 2]}
    fields = Fields(values, "f.json")
    assert [fields.word(name) for name in "abcde"] == ["3", "1000", "0", "2.5", "1e+300"]
    assert fields.words("f") == ["1", "2"]


@pytest.mark.parametrize("text", ["[1]", "[", "a,b", "3", '"x"'])
def test_a_line_that_is_no_object_is_told_what_a_line_is(tmp_path, text):
    (tmp_path / "f.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"line 1: .*each line of this file is one JSON object"):
        list(read_jsonl(tmp_path / "f.jsonl"))
