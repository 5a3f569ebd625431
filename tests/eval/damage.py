"""Every benchmark's folder with one small damage: each field of the last row of each file, and each file as a whole."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.damage import DROP, changed
from tests.eval import layouts

DEEP: Any = []
for _ in range(300):
    DEEP = [DEEP]
RETYPED: dict[str, Any] = {
    "drop": DROP,
    "null": None,
    "7": 7,
    "true": True,
    "empty": "",
    "blank": " ",
    "text": "text",
    "[]": [],
    "{}": {},
    "[null]": [None],
    "object": {"a": 1},
    "nan": math.nan,
    "inf": math.inf,
    "-1": -1,
    "1e400": 10**400,
    "half a pair": "\ud800",
    "long": "x" * 5000,
    "nul": "a\0b",
    "dots": "../..",
    "deep": DEEP,
}


def spoilt_bytes() -> dict[str, Callable[[bytes], bytes]]:
    """Name -> what happens to a whole file."""
    return {
        "empty": lambda data: b"",
        "white space": lambda data: b" \n\n",
        "mark": lambda data: b"\xef\xbb\xbf" + data,
        "crlf": lambda data: data.replace(b"\n", b"\r\n"),
        "utf-16": lambda data: data.decode().encode("utf-16"),
        "utf-16 without a mark": lambda data: data.decode().encode("utf-16-le"),
        "cp1252": lambda data: data[:-5] + b"\xe9" + data[-5:],
        "half": lambda data: data[: len(data) // 2],
        "cut": lambda data: data[:-2],
        "web page": lambda data: b"<!DOCTYPE html><html><body>404</body></html>",
        "nested": lambda data: b"[" * 100_000,
        "nested in a field": lambda data: b'{"question_id": ' + b"[" * 100_000,
        "digits": lambda data: b'{"question_id": ' + b"9" * 5000 + b"}\n" + data,
        "twice": lambda data: data.replace(b'{"', b'{"a": 1, "a": 1, "', 1),
        "list of lists": lambda data: b"[[]]",
        "object": lambda data: b"{}",
        "null": lambda data: b"null",
        "text": lambda data: b'"text"',
        "pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n",
        "zeros": lambda data: bytes(100),
        "last line twice": lambda data: data + b"\n" + data.splitlines()[-1],
    }


@dataclass(frozen=True)
class Damage:
    """A file of a folder, and its bytes after the damage."""

    name: str
    path: str
    data: bytes


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the fields of the last row are: of a list and of an object of rows the last, of a row all."""
    if path:
        yield path
    if isinstance(value, dict):
        whole = list(value)
        rows = len(whole) > 1 and all(isinstance(v, dict) for v in value.values()) and not path
        for name in whole[-1:] if rows else whole:
            yield from places(value[name], (*path, name))
    elif isinstance(value, list) and value:
        yield from places(value[-1], (*path, len(value) - 1))


def damages(folder: Path) -> Iterator[Damage]:
    """Every damage of every JSON and text file below a folder."""
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".jsonl", ".txt")):
        name, data = str(path.relative_to(folder)), path.read_bytes()
        if path.suffix == ".txt" and not (b"\tYes\n" in data and "existence/0001" in name):
            continue
        for what, spoil in spoilt_bytes().items():
            yield Damage(f"{name}: {what}", name, spoil(data))
        if path.suffix == ".txt":
            continue
        lines = data.decode().splitlines()
        by_line = len(lines) > 1
        value = json.loads(lines[-1]) if by_line else json.loads(data)
        for place in places(value):
            for kind, new in RETYPED.items():
                text = json.dumps(changed(value, place, new))
                whole = "\n".join([*lines[:-1], text, ""]) if by_line else text
                yield Damage(f"{name}: {'.'.join(map(str, place))}: {kind}", name, whole.encode())


def custom(root: Path) -> None:
    """Two questions of one's own that use every field."""
    layouts.write_images(root, ["a.png", "b.png"])
    row = {"question": "Q?", "answer": ["cat", "B"], "choices": ["dog", "cat"], "category": "c"}
    rows = [{"id": 1, **row, "image": "a.png"}, {"id": "two", **row, "images": ["a.png", "b.png"]}]
    layouts.write_jsonl(root / "questions.jsonl", rows)


def easy_vqa(root: Path) -> None:
    """Two questions of easy-VQA's prepared folder."""
    layouts.write_images(root / "images" / "test", ["0.png"])
    row = {"image": "test/0.png", "question": "what shape is it?", "answer": "circle", "type": "shape"}
    layouts.write_json(root / "test.json", [{"id": f"test-{i}", **row} for i in range(2)])


def vqav2_val(root: Path) -> None:
    """Two questions of VQAv2's val2014."""
    questions = [{"image_id": 1, "question": f"Q {i}?", "question_id": 10 + i} for i in range(2)]
    answers = [{"answer": "yes", "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]
    known = {"image_id": 1, "question_type": "is", "answer_type": "yes/no", "multiple_choice_answer": "yes"}
    annotations = [{**known, "question_id": 10 + i, "answers": answers} for i in range(2)]
    layouts.write_images(root / "vqav2" / "val2014", ["COCO_val2014_000000000001.jpg"])
    folder = root / "vqav2"
    layouts.write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    layouts.write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})


BUILDERS: dict[str, tuple[str, tuple[str, ...], Callable[[Path], None]]] = {
    **{name: (name, (), build) for name, build in layouts.BUILDERS.items()},
    "vqav2_val": ("vqav2", ("vqav2.split=val2014",), vqav2_val),
    "easy_vqa": ("easy_vqa", (), easy_vqa),
    **{
        f"custom_{metric}": ("custom", (f"custom.metric={metric}",), custom)
        for metric in ("exact", "contains", "choice")
    },
}
"""Name -> (benchmark, its options, what builds its folder)."""


class Spoilt:
    """A folder in which one file at a time is damaged, and restored."""

    def __init__(self, folder: Path, build: Callable[[Path], None]) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        build(folder)

    def each(self) -> Iterator[Damage]:
        """One damage after the other, in the folder while the loop's body runs."""
        for damage in list(damages(self.folder)):
            path = self.folder / damage.path
            whole = path.read_bytes()
            path.write_bytes(damage.data)
            yield damage
            path.write_bytes(whole)
