"""CSV (or values between semicolons or tabs) with a header: image, question, answer, and perhaps id."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from tinyllava_fast.data.formats._base import RECORD_FORMATS, Broken, Head, Opened, Place, RecordFormat, Row
from tinyllava_fast.data.formats._shapes import Shape, Whole, check_held, not_held
from tinyllava_fast.data.record import FaultError
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.fields import is_text, not_utf8, shown

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

    def write(self, path: Path, samples: Iterable[Whole], shape: Shape | None) -> None:
        """See the base class. One question a record; beside it columns of text alone."""
        if shape is not None:
            raise UserError(f"--shape {shape}: a table has the columns question and answer; leave it out")
        names = {"id": None, "question": None, "answer": None}
        for one in samples:
            values = _values_of(one)
            check_held(one, {name: value for name, value in values.items() if value or name == "answer"})
            names |= dict.fromkeys(values)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(map(_values_of, samples))


RECORD_FORMATS.register("csv")(CsvTable())


def _values_of(one: Whole) -> dict[str, str]:
    """Return the cells of a record. DataError for what no cell can hold."""
    record = one.record
    if len(record.turns) > 1:
        raise not_held(one, f"conversations: {len(record.turns)} questions, and a line holds one")
    if len(record.images) > 1:
        raise not_held(one, f"image: {len(record.images)} images, and a line holds one")
    [(question, answer)] = record.turns
    cells: dict[str, object] = {"id": record.id, "question": question, "answer": answer}
    if one.images:
        if one.images[0].inside is not None:
            raise not_held(
                one, "image: bytes, which a text cannot hold; write the images to files with --images FOLDER"
            )
        cells["image"] = one.images[0].name
    if record.system is not None:
        cells["system"] = record.system
    for name, value in (record.extra or {}).items():
        if name in cells or name in ("system", "caption") or name != name.strip() or not is_text(name):
            told = name if is_text(name) else shown(name)
            raise not_held(one, f"{told}: no column can have this name; leave it out with --drop {told}")
        cells[name] = value
    for name, value in cells.items():
        if not isinstance(value, str) or "\0" in value or len(value) > _LONGEST or not is_text(value):
            raise not_held(one, f"{name}: expected text, got {shown(value)}; leave it out with --drop {name}")
    return {name: str(value) for name, value in cells.items()}


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
