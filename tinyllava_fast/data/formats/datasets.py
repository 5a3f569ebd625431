"""Hugging Face ``datasets``: a folder that ``save_to_disk`` wrote, and the Arrow files in it.

The files are mapped into memory, so an image costs no more than its own bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_fast.data.formats._arrow import damaged, pyarrow, rows_of
from tinyllava_fast.data.formats._base import RECORD_FORMATS, Broken, Head, Mark, Opened, Place, RecordFormat, Row
from tinyllava_fast.data.formats._embedded import Embedded, walk
from tinyllava_fast.errors import DataError
from tinyllava_fast.fields import read_object

if TYPE_CHECKING:
    import pyarrow as pa

_STREAM, _FILE = b"\xff\xff\xff\xff", b"ARROW1"
_NAME = "arrow"


class Datasets(RecordFormat):
    """The folder: state.json names its files in order."""

    holds_images = True

    def matches(self, head: Head) -> bool:
        """See the base class."""
        return "dataset_dict.json" in head.names or {"state.json", "dataset_info.json"} <= set(head.names)

    def rows(self, path: Path, base: Path, opened: Opened) -> Iterator[Row | Broken]:
        """See the base class. DataError for a folder of several splits."""
        for file in self.files(path):
            for row in RECORD_FORMATS.get(_NAME).rows(file, base, opened):
                yield replace(row, place=f"{file.name}, {row.place}") if isinstance(row, Row) else row

    def files(self, path: Path) -> list[Path]:
        """See the base class."""
        if not (path / "state.json").is_file():
            splits = read_object(path / "dataset_dict.json").texts("splits")
            raise DataError(f"{path}: holds the splits {', '.join(splits)}; name one of them: {path / splits[0]}")
        return [path / item.path("filename") for item in read_object(path / "state.json").mappings("_data_files")]


class Arrow(RecordFormat):
    """One Arrow file, of the stream or of the file format."""

    sharded = holds_images = True

    def matches(self, head: Head) -> bool:
        """See the base class."""
        return head.start.startswith((_STREAM, _FILE))

    def rows(self, path: Path, base: Path, opened: Opened) -> Iterator[Row | Broken]:
        """See the base class."""
        return self.rows_from(path, base, opened, (0,))

    def rows_from(self, path: Path, base: Path, opened: Opened, mark: Mark) -> Iterator[Row | Broken]:
        """See the base class. A mark is the number of a row."""
        first, errors = 0, pyarrow(path).ArrowException
        try:
            for number, batch in enumerate(_batches(path)):
                before = min(max(mark[0] - first, 0), len(batch))
                refer = partial(_refer, path, base, number, first)
                yield from rows_of(batch.slice(before), first + before, refer)
                first += len(batch)
        except errors as error:
            raise damaged(path, error) from error

    def image(self, path: Path, address: tuple[int, ...], place: Place) -> object:
        """See the base class. The address is the record batch and the row in it."""
        batch = _mapped(path)[address[0]]
        return walk(batch.column(str(place[0]))[address[1]].as_py(), place[1:])


RECORD_FORMATS.register(_NAME)(Arrow())
RECORD_FORMATS.register("datasets")(Datasets())


def _refer(path: Path, base: Path, batch: int, first: int, row: int, place: Place) -> str:
    return Embedded(_NAME, str(path), (batch, row - first), place).reference(base)


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    arrow, ipc = pyarrow(path), pyarrow(path, "pyarrow.ipc")
    view = arrow.memory_map(str(path))
    if view.read(len(_FILE)) == _FILE:
        reader = ipc.open_file(view)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        return
    view.seek(0)
    yield from ipc.open_stream(view)


@lru_cache(maxsize=64)
def _mapped(path: Path) -> list[pa.RecordBatch]:
    """Return the record batches of a file, which take memory only where they are looked at."""
    return list(_batches(path))
