"""LLaVA-format records from a JSON list or a JSONL file: streamed, strictly checked, errors name file, line, record."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tinyllava_fast.data.templates.base import turns_of
from tinyllava_fast.errors import DataError, nearest

_ROLES = ("human", "gpt")
_SPACE = re.compile(r"\s*")
_CHUNK = 1 << 20  # characters read at a time from a JSON list


@dataclass(frozen=True)
class Record:
    """One sample: questions and answers, about an image or not."""

    index: int
    """Position in the file, from 0."""
    id: str
    """The record's own id, or its index."""
    line: int
    """Line of the file on which the record begins, from 1."""
    image: str | tuple[str, ...] | None
    """Image path relative to the image folder, or the paths of a list: then the i-th marker is the i-th image."""
    turns: tuple[tuple[str, str], ...]
    """(question, answer) pairs."""

    @property
    def images(self) -> tuple[str, ...]:
        """Its image paths; empty for text alone."""
        return (self.image,) if isinstance(self.image, str) else self.image or ()

    @property
    def interleaved(self) -> bool:
        """Whether the images are a list, so that each marker stays where it is and stands for its own."""
        return isinstance(self.image, tuple)

    @property
    def where(self) -> str:
        """How an error names this record."""
        return f"record {self.index} (id {self.id!r}, line {self.line})"


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of a file, one at a time, in order.

    A file that begins with ``[`` is a JSON list, any other one JSONL. DataError for a missing or empty file, malformed
    JSON, and any record that is not {id?, image?, conversations: [{from, value}, ...]} with human and gpt in turn.
    image: one path, or a list of paths, which may also be called images.
    """
    empty = True
    try:
        with open(path, encoding="utf-8-sig") as stream:
            for index, (line, value) in enumerate(_values(path, stream)):
                empty = False
                yield _record(path, index, line, value)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot read the records: {error.strerror}; check data.records") from error
    if empty:
        raise DataError(f"{path}: holds no records; expected a JSON list of records, or one record a line")


class _Reader:
    """Decodes JSON values one after the other out of a stream, holding no more text than one value needs."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.text = ""
        self.at = 0
        self.line = 1  # of the character at `counted`
        self.counted = 0
        self.decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None  # noqa: S101 the pattern matches the empty string
            self.at = match.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._fill():
                return ""

    def value(self) -> tuple[int, Any]:
        """(line, value) of the next JSON value; JSONDecodeError where there is none."""
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except json.JSONDecodeError:
                if not self._fill():
                    self.decode(self.text, self.at)  # raises again, with positions in the text now held
            else:
                self.line = self.line_at(self.at)
                self.counted = self.at
                self.at = end
                return self.line, value

    def line_at(self, position: int) -> int:
        """Line number of a position in the text held."""
        return self.line + self.text.count("\n", self.counted, position)

    def _fill(self) -> bool:
        """Read on, at least as much as is waiting, so that a long value costs linear time."""
        self.line = self.line_at(self.at)
        self.text = self.text[self.at :]
        self.at = self.counted = 0
        more = self.stream.read(max(_CHUNK, len(self.text)))
        self.text += more
        return bool(more)


def _values(path: str | Path, stream: TextIO) -> Iterator[tuple[int, Any]]:
    """(line, value) of every record, not yet checked."""
    reader = _Reader(stream)
    if reader.peek() == "[":
        yield from _list_values(path, reader)
        return
    stream.seek(0)
    index = 0
    for line, text in enumerate(stream, 1):
        if not text.strip():
            continue
        try:
            yield line, json.loads(text)
        except json.JSONDecodeError as error:
            raise _malformed(path, line, index, error.msg) from error
        index += 1


def _list_values(path: str | Path, reader: _Reader) -> Iterator[tuple[int, Any]]:
    reader.at += 1
    index = 0
    while (sign := reader.peek()) != "]":
        if index:
            if sign != ",":
                raise _malformed(path, reader.line_at(reader.at), index, "expected ',' or ']' after the record before")
            reader.at += 1
            reader.peek()
        try:
            yield reader.value()
        except json.JSONDecodeError as error:
            raise _malformed(path, reader.line_at(error.pos), index, error.msg) from error
        index += 1
    reader.at += 1
    if reader.peek():
        raise _malformed(path, reader.line_at(reader.at), index, "text after the end of the list")


def _malformed(path: str | Path, line: int, index: int, what: str) -> DataError:
    return DataError(f"{path}: line {line}, record {index}: malformed JSON: {what}; mend or remove this record")


def _record(path: str | Path, index: int, line: int, value: Any) -> Record:
    def fail(field: str, what: str) -> DataError:
        name = value.get("id", index) if isinstance(value, dict) else index
        return DataError(f"{path}: record {index} (id {str(name)!r}, line {line}): {field}: {what}")

    if not isinstance(value, dict):
        raise fail("record", f"expected an object with 'conversations', got {type(value).__name__}")
    key = "images" if value.get("images") is not None else "image"
    image = value.get(key)
    if key == "images" and value.get("image") is not None:
        raise fail("images", "given beside 'image'; keep one of them")
    if image is not None and not _is_image(image, single=key == "image"):
        kind = "one path or a list of paths" if key == "image" else "a list of paths"
        raise fail(key, f"expected {kind} relative to data.image_folder, got {image!r}")
    if isinstance(image, list):
        image = tuple(image) or None
    messages = value.get("conversations")
    if messages is None:
        raise fail("conversations", f"missing; {nearest('conversations', map(str, value))}")
    if not isinstance(messages, list) or not messages:
        raise fail("conversations", "expected a list of {from, value} with at least one question and one answer")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("from") not in _ROLES:
            got = message.get("from") if isinstance(message, dict) else message
            raise fail(f"conversations[{number}].from", f"expected 'human' or 'gpt', got {got!r}")
        if not isinstance(message.get("value"), str):
            raise fail(f"conversations[{number}].value", f"expected text, got {message.get('value')!r}")
        if not _is_text(message["value"]):
            raise fail(f"conversations[{number}].value", "contains half of a surrogate pair; mend it")
    offset = int(messages[0]["from"] == "gpt")
    for number, message in enumerate(messages[offset:]):
        if message["from"] != _ROLES[number % 2]:
            raise fail(
                f"conversations[{number + offset}].from",
                f"two messages of {message['from']!r} in a row; questions (human) and answers (gpt) must alternate",
            )
    try:
        turns = turns_of(messages)
    except DataError as error:
        raise fail("conversations", str(error)) from error
    if not turns:
        raise fail("conversations", "no question; add a 'human' message and its answer")
    name = str(value.get("id", index)).encode(errors="replace").decode()
    return Record(index, name, line, image, tuple((q, a or "") for q, a in turns))


def _is_image(value: Any, single: bool) -> bool:
    """Whether it is a list of paths, or one path where that may be."""
    paths = value if isinstance(value, list) else [value] if single else [None]
    return all(isinstance(path, str) and path and _is_text(path) for path in paths)


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: JSON escapes can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:
        return False
    return True
