"""A JSON list of records, or one record a line (JSONL): streamed, strictly checked, errors name the line.

A file whose name ends in .json is written as a list, every other one with a record a line.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from tinyllava_fast.data.formats._base import RECORD_FORMATS, TEXT, Broken, Head, Mark, Opened, Place, RecordFormat, Row
from tinyllava_fast.data.formats._embedded import Embedded, walk
from tinyllava_fast.data.formats._shapes import Shape, Whole, check_held, fields_of, json_of, not_held
from tinyllava_fast.data.record import FaultError
from tinyllava_fast.errors import DataError
from tinyllava_fast.fields import DECODER, fault, not_utf8

_SPACE = re.compile(r"\s*")
_CHUNK = 1 << 20  # characters read at a time from a JSON list


class JsonText(RecordFormat):
    """A file that begins with ``[`` is a JSON list, any other one JSONL."""

    marks_are_bytes = True

    def matches(self, head: Head) -> bool:
        """See the base class."""
        return head.start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"[", b"{")

    def rows(self, path: Path, base: Path, opened: Opened) -> Iterator[Row | Broken]:
        """See the base class. A line of JSONL that is no JSON is broken; in a list, reading ends at such a record."""
        return self.rows_from(path, base, opened, ())

    def rows_from(self, path: Path, base: Path, opened: Opened, mark: Mark) -> Iterator[Row | Broken]:
        """See the base class. A mark is the first byte, the line and the number of an entry."""
        try:
            with path.open("rb") as file:
                skipped = len(codecs.BOM_UTF8) * (file.read(3) == codecs.BOM_UTF8)
                file.seek(skipped)
                with TextIOWrapper(file, encoding="utf-8", newline="") as stream:
                    listed = _Reader(stream, skipped).peek() == "["
            byte, line, index = mark or (skipped, 1, 0)
            with path.open("rb") as file:
                file.seek(byte)
                with TextIOWrapper(file, encoding="utf-8", newline="") as stream:
                    opened(file)
                    if listed:
                        yield from _list_rows(path, base, _Reader(stream, byte, line), index, inside=bool(mark))
                    else:
                        yield from _line_rows(path, base, stream, (byte, line, index))
        except UnicodeDecodeError as error:
            raise not_utf8(path, error) from None

    def image(self, path: Path, address: tuple[int, ...], place: Place) -> object:
        """See the base class. The address is the first byte of the record and the number of its bytes."""
        with path.open("rb") as file:
            file.seek(address[0])
            return walk(json.loads(file.read(address[1])), place)

    def write(self, path: Path, samples: Iterable[Whole], shape: Shape | None) -> None:
        """See the base class."""
        before, between, after = ("[\n", ",\n", "\n]\n") if path.suffix == ".json" else ("", "\n", "\n")
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for number, one in enumerate(samples):
                file.write((between if number else before) + object_of(one, shape))
            file.write(after)


RECORD_FORMATS.register(TEXT)(JsonText())


def object_of(one: Whole, shape: Shape | None = None) -> str:
    """Return a record as one line of JSON, without its end. DataError for what the shape cannot hold."""
    images = [one.text(number) for number in range(len(one.images))]
    try:
        values = fields_of(one.record, shape or "llava", images)
    except FaultError as fault:
        raise not_held(one, str(fault)) from None
    line = json_of(one, values)
    check_held(one, values)
    return line


class _Reader:
    """Decodes JSON values one after the other out of a stream, holding no more text than one value needs."""

    def __init__(self, stream: TextIO, byte: int, line: int = 1) -> None:
        """byte, line: of the file, at which the stream begins."""
        self.stream = stream
        self.text = ""
        self.at = 0
        self.line, self.byte = line, byte  # of the character at `counted`
        self.counted = 0
        self.decode = DECODER.raw_decode

    def peek(self) -> str:
        """Return the next character that is not white space; "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None  # noqa: S101 the pattern matches the empty string
            self.at = match.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._fill():
                return ""

    def value(self) -> object:
        """Return the next JSON value, at ``line`` and ``byte``; JSONDecodeError for none."""
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except json.JSONDecodeError:
                if not self._fill():
                    self.decode(self.text, self.at)  # raises again, with positions in the text now held
            else:
                self._count()
                self.at = end
                return value

    def line_at(self, position: int) -> int:
        """Return the line number of a position in the text held."""
        return self.line + self.text.count("\n", self.counted, position)

    def address(self) -> tuple[int, int]:
        """Return the first byte and the number of bytes of the value read last."""
        return self.byte, _bytes(self.text[self.counted : self.at])

    def _count(self) -> None:
        """Note line and byte of the next character."""
        self.line = self.line_at(self.at)
        self.byte += _bytes(self.text[self.counted : self.at])
        self.counted = self.at

    def _fill(self) -> bool:
        """Read on, at least as much as is waiting, so that a long value costs linear time."""
        self._count()
        self.text = self.text[self.at :]
        self.at = self.counted = 0
        more = self.stream.read(max(_CHUNK, len(self.text)))
        self.text += more
        return bool(more)


def _list_rows(path: Path, base: Path, reader: _Reader, index: int, *, inside: bool) -> Iterator[Row]:
    """Yield the entries from number ``index`` on. inside: the reader is at an entry, not at the list's beginning."""

    def refer(place: Place) -> str:
        return Embedded(TEXT, str(path), reader.address(), place).reference(base)

    if not inside:
        reader.peek()
        reader.at += 1
    first = index
    while (sign := reader.peek()) != "]":
        if index > first:
            if sign != ",":
                line = reader.line_at(reader.at)
                raise _malformed(path, line, index, "expected ',' or ']' after the record before; mend this record")
            reader.at += 1
            reader.peek()
        try:
            value = reader.value()
        except json.JSONDecodeError as error:
            what = f"{error.msg}; mend or remove this record"
            raise _malformed(path, reader.line_at(error.pos), index, what) from None
        except (ValueError, RecursionError) as error:
            raise _malformed(path, reader.line_at(reader.at), index, fault(error)) from None
        yield Row(value, reader.line, refer, mark=(reader.byte, reader.line, index))
        index += 1
    reader.at += 1
    if reader.peek():
        raise _malformed(path, reader.line_at(reader.at), index, "text after the end of the list; remove it")


def _line_rows(path: Path, base: Path, stream: TextIO, begin: tuple[int, int, int]) -> Iterator[Row | Broken]:
    def refer(start: int, size: int, place: Place) -> str:
        return Embedded(TEXT, str(path), (start, size), place).reference(base)

    start, first, index = begin
    for line, text in enumerate(stream, first):
        size = _bytes(text)
        if text.strip():
            try:
                yield Row(DECODER.decode(text), line, partial(refer, start, size), mark=(start, line, index))
            except (ValueError, RecursionError) as error:
                hint = "" if index else "; in a file that is no JSON list, each line holds one whole record"
                yield Broken(str(_malformed(path, line, index, fault(error, text) + hint)), line, (start, line, index))
            index += 1
        start += size


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _malformed(path: Path, line: int, index: int, what: str) -> DataError:
    return DataError(f"{path}: line {line}, record {index}: malformed JSON: {what}")
