"""Lines that say how far a pass over the records of a source is."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from io import BufferedIOBase
from typing import TypeVar

from tinyllava_fast.log import log
from tinyllava_fast.pace import Pace

T = TypeVar("T")


class Progress:
    """Lines that say how many records are done, how fast, and how long the rest will take.

    size: bytes of all files together. what: is done with the records, a past participle.
    """

    def __init__(self, path: str, size: int, what: str) -> None:
        self._path, self._size, self._what = path, size, what
        self._pace, self._said = Pace(wait_s=5.0), False
        self._file: BufferedIOBase | None = None
        self._before = 0  # bytes of the files before this one
        self._waiting = deque[int]()  # records of the parts that are read, but not done
        self.count = 0
        """Records done."""

    def opened(self, file: BufferedIOBase) -> None:
        """Note the file whose position tells how far its reader is."""
        if self._file is not None:
            self._before += os.path.getsize(self._file.name)  # type: ignore[attr-defined]
        self._file = file

    def counted(self, parts: Iterable[list[T]]) -> Iterator[list[T]]:
        """Yield the parts, and note how many records each has."""
        for part in parts:
            self._waiting.append(len(part))
            yield part

    def done(self) -> None:
        """Count a part, in their order, as done. Log a line if one is due."""
        self.count += self._waiting.popleft()
        if not self._pace.due():
            return
        self._said = True
        seconds, rate = self._pace.elapsed_s, self.count / self._pace.elapsed_s
        if self._file is None:  # nothing tells how far it is
            log.info("%s: %d records %s so far, %.0f a second", self._path, self.count, self._what, rate)
            return
        at = self._size if self._file.closed else self._before + self._file.tell()
        done = min(at / max(self._size, 1), 1.0)
        rest = seconds / max(done, 1e-9) * (1 - done)
        text = "%s: %d records %s so far (%.0f %%), %.0f a second, about %.0f s left"
        log.info(text, self._path, self.count, self._what, 100 * done, rate, rest)

    def say_last(self) -> None:
        """Log the end of what was announced."""
        if self._said:
            log.info("%s: %d records %s in %.0f s", self._path, self.count, self._what, self._pace.elapsed_s)
