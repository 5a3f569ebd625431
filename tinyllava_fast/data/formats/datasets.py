"""Hugging Face ``datasets``: a folder that ``save_to_disk`` wrote, and the Arrow files in it.

The files are mapped into memory, so an image costs no more than its own bytes.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_fast.data.formats._arrow import damaged, pyarrow, rows_of
from tinyllava_fast.data.formats._base import RECORD_FORMATS, Broken, Head, Mark, Opened, Place, RecordFormat, Row
from tinyllava_fast.data.formats._embedded import Embedded, walk
from tinyllava_fast.data.formats._shapes import Shape, Whole
from tinyllava_fast.data.formats._tables import batches, features_of, with_features
from tinyllava_fast.errors import DataError
from tinyllava_fast.fields import read_object

if TYPE_CHECKING:
    import pyarrow as pa

_STREAM, _FILE = b"\xff\xff\xff\xff", b"ARROW1"
_NAME = "arrow"


class Datasets(RecordFormat):
    """The folder: state.json names its files in order."""

    holds_images = is_folder = True

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

    def write(self, path: Path, samples: Iterable[Whole], shape: Shape | None) -> None:
        """See the base class."""
        file = path / "data-00000-of-00001.arrow"
        features = _write(file, samples, shape)
        state: dict[str, object] = {
            **{"_data_files": [{"filename": file.name}], "_fingerprint": secrets.token_hex(8), "_split": None},
            **{"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False},
        }
        about = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
        for name, values in (("state.json", state), ("dataset_info.json", about)):
            (path / name).write_text(json.dumps(values, indent=2), encoding="utf-8")


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

    def write(self, path: Path, samples: Iterable[Whole], shape: Shape | None) -> None:
        """See the base class."""
        _write(path, samples, shape)


RECORD_FORMATS.register(_NAME)(Arrow())
RECORD_FORMATS.register("datasets")(Datasets())


def _write(path: Path, samples: Iterable[Whole], shape: Shape | None) -> dict[str, object]:
    """Write an Arrow file of the stream format; return its columns in the words of ``datasets``."""
    ipc = pyarrow(path, "pyarrow.ipc")
    schema, parts = batches(path, samples, shape or "llava")
    with ipc.new_stream(path, with_features(schema)) as writer:
        for part in parts:
            writer.write_batch(part)
    return features_of(schema)


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
