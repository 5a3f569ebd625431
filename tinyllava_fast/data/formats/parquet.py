"""Parquet: one row a record, read a row group at a time.

An image is read by reading the column of its row group, of which each process keeps the last few: small row groups
(datasets writes 100 rows with images) serve random access well, large ones slowly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from tinyllava_fast.data.formats._arrow import AT_ONCE, damaged, pyarrow, rows_of
from tinyllava_fast.data.formats._base import RECORD_FORMATS, Broken, Head, Mark, Opened, Place, RecordFormat, Row
from tinyllava_fast.data.formats._embedded import Embedded, walk
from tinyllava_fast.data.formats._shapes import Shape, Whole
from tinyllava_fast.data.formats._tables import batches, with_features

if TYPE_CHECKING:
    import pyarrow as pa

_NAME = "parquet"
_MAGIC = b"PAR1"
_KEPT = 2  # columns of row groups in memory
_LOCK = Lock()  # threads that look at neighbouring images want the same column


class Parquet(RecordFormat):
    """A file of Apache Parquet."""

    sharded = holds_images = True

    def matches(self, head: Head) -> bool:
        """See the base class."""
        return head.start.startswith(_MAGIC)

    def rows(self, path: Path, base: Path, opened: Opened) -> Iterator[Row | Broken]:
        """See the base class."""
        return self.rows_from(path, base, opened, (0,))

    def rows_from(self, path: Path, base: Path, opened: Opened, mark: Mark) -> Iterator[Row | Broken]:
        """See the base class. A mark is the number of a row; row groups before it are not read."""
        parquet, first = pyarrow(path, "pyarrow.parquet"), 0
        errors = pyarrow(path).ArrowException
        try:
            file = parquet.ParquetFile(path, memory_map=True)
            for group in range(file.num_row_groups):
                if first + (rows := file.metadata.row_group(group).num_rows) <= mark[0]:
                    first += rows
                    continue
                refer = partial(_refer, path, base, group)
                for batch in file.iter_batches(AT_ONCE, row_groups=[group], use_threads=False):
                    before = min(max(mark[0] - first, 0), len(batch))
                    yield from rows_of(batch.slice(before), first + before, refer)
                    first += len(batch)
        except errors as error:
            raise damaged(path, error) from error

    def image(self, path: Path, address: tuple[int, ...], place: Place) -> object:
        """See the base class. The address is the row group and the row of the file."""
        with _LOCK:
            column, start = _column(path, address[0], str(place[0]))
        return walk(column[address[1] - start].as_py(), place[1:])

    def write(self, path: Path, samples: Iterable[Whole], shape: Shape | None) -> None:
        """See the base class. Row groups are small, so that images can be read in any order."""
        parquet = pyarrow(path, "pyarrow.parquet")
        schema, parts = batches(path, samples, shape or "llava")
        with parquet.ParquetWriter(path, with_features(schema)) as writer:
            for part in parts:
                writer.write_batch(part, row_group_size=len(part))


RECORD_FORMATS.register(_NAME)(Parquet())


def _refer(path: Path, base: Path, group: int, row: int, place: Place) -> str:
    return Embedded(_NAME, str(path), (group, row), place).reference(base)


@lru_cache(maxsize=_KEPT)
def _column(path: Path, group: int, name: str) -> tuple[pa.ChunkedArray, int]:
    """Return a column of a row group, and the number of the group's first row."""
    file = pyarrow(path, "pyarrow.parquet").ParquetFile(path, memory_map=True)
    start = sum(file.metadata.row_group(n).num_rows for n in range(group))
    return file.read_row_group(group, columns=[name], use_threads=False).column(0), start
