"""CSV (or values between semicolons or tabs) with a header: image, question, answer, and perhaps id."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from tinyllava_fast.data.formats._base import RECORD_FORMATS, Broken, Head, Opened, Place, RecordFormat, Row
from tinyllava_fast.data.record import FaultError
from tinyllava_fast.errors import DataError
from tinyllava_fast.fields import not_utf8, shown

_COLUMNS = ({"question", "answer"}, {"image", "caption"})
_LONGEST = 1 << 24  # characters of a cell; the library's own limit, 131,072, is less than some documents have
_SEPARATORS = (",", ";", "\t")


class CsvTable(RecordFormat):
    """A table whose first line names the columns: question and answer, or image and caption, among others."""

    def matches(self, head: Head) -> bool:
        """See the base class."""
        line = head.start.removeprefix(b"\xef\xbb\xbf").partition(b"\n")[0].decode("utf-8", "replace")
        return bool(_separator(line))

    def rows(self, path: Path, base: Path, opened: Opened) -> Iterator[Row | Broken]:
        """See the base class. A line with another number of values than the header is broken."""
        try:
            with path.open("rb") as file, TextIOWrapper(file, encoding="utf-8-sig", newline="") as stream:
                opened(file)
                separator = _separator(stream.readline())
                stream.seek(0)
                yield from _rows(path, stream, separator)
        except UnicodeDecodeError as error:
            raise not_utf8(path, error) from None


RECORD_FORMATS.register("csv")(CsvTable())


def _separator(line: str) -> str:
    """Return what stands between the names of a header; "" if the line is none."""
    for separator in _SEPARATORS:
        names = {name.strip().strip('"') for name in line.split(separator)}
        if any(wanted <= names for wanted in _COLUMNS):
            return separator
    return ""


def _rows(path: Path, stream: TextIO, separator: str) -> Iterator[Row | Broken]:
    reader = csv.reader(stream, delimiter=separator, strict=True)
    csv.field_size_limit(_LONGEST)
    line = 1
    try:
        header, line = [name.strip() for name in next(reader)], reader.line_num + 1
        if twice := next((name for name in header if header.count(name) > 1), ""):
            raise DataError(f"{path}: line 1: the column {shown(twice)} stands twice; rename one")
        for values in reader:
            if len(values) == len(header):
                # An empty cell is no value; an empty answer is learnt as one.
                given = {n: v for n, v in zip(header, values, strict=True) if v or n == "answer"}
                yield Row(given, line, _no_reference)
            elif values:
                what = f"{len(values)} values under {len(header)} columns; put text with {separator!r}"
                yield Broken(f"{path}: line {line}: {what} in it into quotation marks", line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}: line {line}: not CSV ({error}); mend or remove it") from None


def _no_reference(place: Place) -> str:
    raise FaultError("image: a data URI in a table of text; write the image to a file, and its path here")
