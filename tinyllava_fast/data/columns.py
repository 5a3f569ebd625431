"""Arrays on disk that are read in place: a folder with one file a column, whole and unchanged or refused.

    <folder>/<column>        the values, one after the other
    <folder>/columns.json    length and CRC-32 of every column

A reader maps the files into memory, so processes share one copy, and none holds more of it than it looks at.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import weakref
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from zlib import crc32

import numpy as np

from tinyllava_fast.errors import DataError
from tinyllava_fast.fields import read_object

INDEX = "columns.json"
_BLOCK = 1 << 20  # bytes read at a time for a check sum

Dtypes = Mapping[str, np.dtype]


class ColumnWriter:
    """Writes columns into an empty folder, a part of each at a time."""

    def __init__(self, folder: Path, dtypes: Dtypes) -> None:
        self.dtypes = dtypes
        self._folder = folder
        self._sums = {name: (0, 0) for name in dtypes}  # (bytes, CRC-32)
        self._stack = ExitStack()
        self._files = {name: self._stack.enter_context((folder / name).open("wb")) for name in dtypes}

    def append(self, name: str, values: np.ndarray) -> None:
        """Add values to a column."""
        content = np.ascontiguousarray(values, self.dtypes[name]).view(np.uint8).data
        self._files[name].write(content)
        length, checksum = self._sums[name]
        self._sums[name] = (length + len(content), crc32(content, checksum))

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def finish(self) -> None:
        """Close the files and write the index; without it there are no columns."""
        self.close()
        columns = {name: {"bytes": length, "crc32": checksum} for name, (length, checksum) in self._sums.items()}
        index = {"columns": columns}
        (self._folder / INDEX).write_text(json.dumps(index | {"crc32": _checksum(index)}), encoding="utf-8")


class MemoryColumns:
    """Columns that are appended to in memory, and read as those on disk are."""

    def __init__(self, dtypes: Dtypes) -> None:
        self.dtypes = dtypes
        self._parts: dict[str, list[np.ndarray]] = {name: [] for name in dtypes}

    def append(self, name: str, values: np.ndarray) -> None:
        """Add values to a column."""
        self._parts[name].append(np.ascontiguousarray(values, self.dtypes[name]))

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a column."""
        parts = self._parts[name]
        if len(parts) != 1:
            parts[:] = [np.concatenate([np.empty(0, self.dtypes[name]), *parts])]
        return parts[0]

    @property
    def checksums(self) -> dict[str, int]:
        """CRC-32 of each column."""
        return {name: crc32(self[name].view(np.uint8).data) for name in self.dtypes}

    def let_go(self) -> None:
        """Nothing is mapped that could be given back."""


class Columns:
    """Columns that ``ColumnWriter`` has written, each checked against its check sum.

    FileNotFoundError if there are none, DataError if they are damaged or of other names.
    """

    def __init__(self, folder: Path, dtypes: Dtypes) -> None:
        held = (folder / INDEX).open("rb")  # and locked, so that nobody removes what is in use
        weakref.finalize(self, held.close)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        index = read_object(folder / INDEX)
        known = index.mapping("columns")
        if index.integer("crc32") != _checksum({"columns": dict(known.values)}):
            raise DataError(f"{folder / INDEX}: damaged")
        self.checksums: dict[str, int] = {}
        self._maps: list[mmap.mmap] = []
        self._arrays: dict[str, np.ndarray] = {}
        for name, dtype in dtypes.items():
            column = known.mapping(name)
            size, self.checksums[name] = column.integer("bytes"), column.integer("crc32")
            self._arrays[name] = self._opened(folder / name, size, self.checksums[name]).view(dtype)

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a column, which cannot be written to."""
        return self._arrays[name]

    def let_go(self) -> None:
        """Give the memory of the pages looked at back to the system's cache; they come back when looked at again."""
        for view in self._maps:
            view.madvise(mmap.MADV_DONTNEED)

    def _opened(self, path: Path, size: int, checksum: int) -> np.ndarray:
        with path.open("rb") as file:
            found, block = 0, bytearray(_BLOCK)
            while count := file.readinto(block):
                found = crc32(memoryview(block)[:count], found)
            if file.tell() != size or found != checksum:
                raise DataError(f"{path}: damaged")
            if not size:
                return np.empty(0, np.uint8)  # what is empty cannot be mapped
            self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            return np.frombuffer(self._maps[-1], np.uint8)


def _checksum(index: Mapping[str, object]) -> int:
    return crc32(json.dumps(index, sort_keys=True).encode())
