"""Formats of records; that of a file is recognized by its content, never by its name."""

from __future__ import annotations

import glob
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.registry import Registry

if TYPE_CHECKING:
    from tinyllava_fast.data.formats._shapes import Shape, Whole

HEAD = 1 << 16
"""Bytes of a file that its format is recognized by."""
Opened = Callable[[BufferedIOBase], None]
Place = tuple["str | int", ...]
"""A way into a record: names of fields and numbers of items."""
Mark = tuple[int, ...]
"""Where an entry begins, in numbers of its format's own, so that reading can begin there; () where that cannot be."""
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "ZIP",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Head:
    """The signs that a format is recognized by. start: first bytes of a file. names: of what is in a folder."""

    path: Path
    start: bytes = b""
    names: tuple[str, ...] = ()


@dataclass(slots=True)
class Row:
    """An entry of a file, not yet checked.

    line: in the file, from 1. place: where it stands, if that is no line. binary: fields in which True stands for bytes
    that are there but were not read. refer: returns a reference to the image at a place of the entry. mark: see Mark.
    """

    values: object
    line: int
    refer: Callable[[Place], str]
    place: str = ""
    binary: frozenset[str] = frozenset()
    mark: Mark = ()


@dataclass(frozen=True)
class Broken:
    """An entry that could not even be read. what: why, with its place. mark: see Mark."""

    what: str
    line: int = 0
    mark: Mark = ()


class RecordFormat(ABC):
    """One form of records. A subclass is registered as an object in RECORD_FORMATS; plugins may add their own."""

    sharded: bool = False
    """A folder of such files is one source, whatever else lies in it."""
    holds_images: bool = False
    """Whether most of its bytes are those of images, so that a file is known by its size and time of change."""
    is_folder: bool = False
    """What ``write`` fills is a folder."""
    always_inside: bool = False
    """``write`` wants the bytes of every image."""
    marks_are_bytes: bool = False
    """Whether a mark begins with the byte of the file at which its entry begins."""

    @abstractmethod
    def matches(self, head: Head) -> bool:
        """Return whether a file or folder that begins like that has this form."""

    @abstractmethod
    def rows(self, path: Path, base: Path, opened: Opened) -> Iterator[Row | Broken]:
        """Yield the entries of a file (or folder) in order, never all of them in memory.

        base: the folder that references name their files relative to. opened: may be told a file whose position is
        about where the reader is. DataError for what cannot be read at all.
        """

    def rows_from(self, path: Path, base: Path, opened: Opened, mark: Mark) -> Iterator[Row | Broken]:
        """Yield the entries as ``rows`` does, from that on which has a mark; of a file whose entries have marks."""
        raise NotImplementedError

    def files(self, path: Path) -> list[Path]:
        """Return the files that are read of a path."""
        return [path]

    def image(self, path: Path, address: tuple[int, ...], place: Place) -> object:
        """Return the bytes of an image, or the text of its data URI, from the address of an entry and the place in it.

        Called by any number of processes, in any order.
        """
        raise NotImplementedError

    def write(self, path: Path, samples: Iterable[Whole], shape: Shape | None) -> None:
        """Write records to an empty file (or folder). samples: may be gone through more than once.

        shape: of the entries; None: the usual one. DataError, naming file, record and field, for what it cannot hold;
        UserError for a shape that it does not have, or if nothing can be written in this format.
        """
        raise UserError(f"{path.name}: this format is read, but not written; choose another --to")


RECORD_FORMATS: Registry[RecordFormat] = Registry("record format", "tinyllava_fast.data.formats")
TEXT = "json"
"""The format of a file that no other format recognizes."""


@dataclass(frozen=True)
class Files:
    """The files of a source and their format. base: see ``RecordFormat.rows``."""

    format: RecordFormat
    paths: list[Path]
    base: Path
    left_out: list[str] = field(default_factory=list)
    """Other files of a folder."""


def base_of(path: str | Path) -> Path:
    """Return the folder that references inside a source name their files relative to."""
    return Path(path) if os.path.isdir(path) else Path(path).parent


def find_files(path: Path) -> Files:
    """Return the files that a path names: one, all of a folder that are of one format, or those of a pattern.

    DataError for a folder without records, or with several kinds of them. A path that does not exist is a file's.
    """
    base = base_of(path)
    if path.is_dir():
        head = Head(path, names=tuple(sorted(os.listdir(path))))
        for name in RECORD_FORMATS:
            if RECORD_FORMATS.get(name).matches(head):
                return Files(RECORD_FORMATS.get(name), [path], base)
        return _of_one_format(path, [path / name for name in head.names if (path / name).is_file()], base)
    if not path.exists() and glob.has_magic(str(path)):
        found = [Path(name) for name in sorted(glob.glob(str(path)))]
        if not found:
            raise DataError(f"{path}: no file fits this pattern; check the path")
        return _of_one_format(path, found, base)
    return Files(RECORD_FORMATS.get(_format_of(path) or TEXT), [path], base)


def _of_one_format(path: Path, files: list[Path], base: Path) -> Files:
    kinds = {file: _format_of(file) for file in files if not file.name.startswith(".")}
    known = [kind for kind in kinds.values() if kind]
    shards = [kind for kind in known if RECORD_FORMATS.get(kind).sharded]
    wanted = sorted(set(shards or known))
    if not wanted:
        what = ", ".join(file.name for file in list(kinds)[:5]) or "nothing"
        raise DataError(f"{path}: a folder without records; it holds {what}; name a file, or a folder of shards")
    if len(wanted) > 1:
        raise DataError(f"{path}: holds records in several forms, {' and '.join(wanted)}; name one file, or a pattern")
    chosen = [file for file, kind in kinds.items() if kind == wanted[0]]
    left_out = [file.name for file in kinds if file not in chosen]
    return Files(RECORD_FORMATS.get(wanted[0]), chosen, base, left_out)


def _format_of(path: Path) -> str | None:
    """Return the format that a file is recognized as; None for one that cannot be read, or that no format knows."""
    try:
        with path.open("rb") as file:
            head = Head(path, file.read(HEAD))
    except OSError:
        return None  # said by who reads it
    for start, name in _PACKED.items():
        if head.start.startswith(start):
            raise DataError(f"{path}: a {name} archive; unpack it, and name what was in it")
    if head.start.startswith(_POINTER):
        raise DataError(f"{path}: a pointer of git LFS, not the records themselves; run git lfs pull")
    return next((name for name in RECORD_FORMATS if RECORD_FORMATS.get(name).matches(head)), None)
