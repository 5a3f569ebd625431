"""The content of pictures, as digests: an answer belongs to what a picture shows, not to its name.

Digests are kept beside the answers with each file's size, times and inode, so that a run which goes on reads only the
pictures that are new or have been touched. A file that was changed in the last moments before it was read is not kept:
a second change could come within one tick of the file system's clock and leave the same times.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tinyllava_fast.errors import DataError, writing
from tinyllava_fast.eval.progress import progress

MISSING = "missing"
CLOSED = "cannot be opened"
SETTLED_S = 2.0  # the coarsest clock of a file system in use (FAT's)
_BLOCK = 1 << 20
_TRIES = 3


class Stamp(NamedTuple):
    """Return values that change with a file. No program can set ctime, so a restored mtime hides no change."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


class Pictures:
    """Digests of the pictures of one benchmark, by path.

    folder: where pictures.jsonl (rank 0), pictures.1.jsonl, ... keep them. threads: files read at once. keep: whether
    new ones are written there.
    """

    def __init__(self, folder: Path, rank: int = 0, threads: int = 2, *, keep: bool = True) -> None:
        self._path = folder / (f"pictures.{rank}.jsonl" if rank else "pictures.jsonl")
        self._threads = threads
        self._keep = keep
        self._kept = dict(_kept(folder))
        self._seen: dict[Path, tuple[Stamp | None, str]] = {}
        self._stale: set[Path] = set()  # changed since they were looked at

    def look(self, paths: Iterable[Path]) -> None:
        """Find out the digest of every path that has not been looked at, or has changed since.

        Raises UserError if digests cannot be kept, or a file never rests.
        """
        new = [path for path in dict.fromkeys(paths) if path not in self._seen or path in self._stale]
        self._stale.difference_update(new)
        unread: list[Path] = []
        for path in new:
            stamp = stamp_of(path)
            digest = MISSING if stamp is None else self._kept.get((os.path.abspath(path), stamp))
            if digest is None:
                unread.append(path)
            else:
                self._seen[path] = stamp, digest
        if unread:
            self._read(unread)

    def digest(self, path: Path) -> str:
        """32 digits of a picture that was looked at; MISSING or CLOSED if there are none."""
        return self._seen[path][1]

    def changed(self, paths: Sequence[Path]) -> list[Path]:
        """Those that are no longer as they were when they were looked at."""
        self._stale.update(path for path in paths if stamp_of(path) != self._seen[path][0])
        return [path for path in paths if path in self._stale]

    def _read(self, paths: Sequence[Path]) -> None:
        path = self._path if self._keep else Path(os.devnull)
        with writing(path), ThreadPoolExecutor(self._threads) as pool:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                if self._keep and file.tell():
                    file.write("\n")  # the last line may have been cut off by a kill
                read = progress(pool.map(_digest, paths), total=len(paths), label="pictures", last=False)
                for picture, (stamp, digest, settled) in zip(paths, read, strict=True):
                    self._seen[picture] = stamp, digest
                    if settled:
                        file.write(json.dumps([os.path.abspath(picture), *(stamp or ()), digest]) + "\n")


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of the file that a path leads to; None if there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _digest(path: Path) -> tuple[Stamp | None, str, bool]:
    """Stamp, digest, and whether the two may be kept together."""
    for _ in range(_TRIES):
        now, stamp = time.time_ns(), stamp_of(path)
        if stamp is None:
            return None, MISSING, False
        content = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    content.update(block)
        except OSError:
            return stamp, CLOSED, False
        if stamp_of(path) == stamp:
            settled = max(stamp.mtime_ns, stamp.ctime_ns) + int(SETTLED_S * 1e9) < now
            return stamp, content.hexdigest()[:32], settled
    raise DataError(
        f"{path}: the file changes while it is read; wait until it is complete and run the same command again"
    )


def _kept(folder: Path) -> Iterator[tuple[tuple[str, Stamp], str]]:
    """Return the entries of earlier sessions and other ranks; a line that is none costs one more look at its file."""
    for path in sorted(folder.glob("pictures*.jsonl")):
        with suppress(OSError):
            for line in path.read_bytes().splitlines():
                with suppress(ValueError, TypeError):
                    name, *stamp, digest = json.loads(line)
                    yield (name, Stamp(*stamp)), digest
