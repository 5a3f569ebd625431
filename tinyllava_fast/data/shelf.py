"""Columns that are made once and kept in the cache folder, for every process and run that asks for the same.

    <cache>/tokens/<key>         a folder of ``Columns``; the key is a digest of all that they depend on
    <cache>/tokens/<key>.lock    while a process makes them, or waits for the one that does

They are written aside and renamed, so a killed writer leaves none, and another takes its turn: the lock ends with the
process. What does not match its check sums is made again. The ones used longest ago go first when the folder exceeds
its limit, but none that a process has open.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tinyllava_fast.data.columns import INDEX, Columns, ColumnWriter, Dtypes
from tinyllava_fast.errors import CheckpointError, DataError, UserError, writing
from tinyllava_fast.files import TMP, atomic_folder, remove
from tinyllava_fast.hardware import cache_folder
from tinyllava_fast.log import log
from tinyllava_fast.pace import Pace

LIMIT = "TLF_TOKENS_GIB"
"""Environment variable: GiB of disk that the folder may take; 0: nothing is kept."""
_DEFAULT_GIB = 20.0
_KEEP = 0.9  # share of the limit that is left after an eviction
_PATIENCE_S = 600.0  # without a sign of life of the process that is waited for
_STALE_S = 86400.0  # a temporary folder of that age has no writer any more
_POLL_S = 0.1

Make = Callable[[ColumnWriter], None]


def take(key: str, dtypes: Dtypes, make: Make, what: str) -> Columns:
    """Return the columns of a key; if they are not there, one process makes them while others wait for it.

    make: writes the columns. what: their name in messages. Where the cache folder
    cannot hold them they are made for this process alone; UserError if there is no room for that either.
    """
    if (found := find(key, dtypes)) is not None:
        return found
    with turn(key, what):
        if (found := find(key, dtypes)) is None and put(key, dtypes, make, what):
            found = find(key, dtypes)
        return found or _private(dtypes, make)


def find(key: str, dtypes: Dtypes) -> Columns | None:
    """Return the columns of a key, which then count as used just now; None, with a warning, if they are damaged."""
    path = _folder() / key
    try:
        found = Columns(path, dtypes)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (DataError, OSError) as error:
        log.warning("%s; it is made again", error)
        remove(path)
        return None
    with suppress(OSError):
        os.utime(path / INDEX)
    return found


def put(key: str, dtypes: Dtypes, make: Make, what: str) -> bool:
    """Make the columns of a key in place of those that are there; False, with a warning, if they cannot be kept."""
    limit = limit_bytes()
    if not limit:
        return False
    try:
        with atomic_folder(_folder() / key, durable=False) as temporary:  # check sums tell what a power cut leaves
            _write(temporary, dtypes, make)
    except CheckpointError as error:
        log.warning("%s: not kept for the next start, which makes it again: %s", what, error)
        return False
    _evict(limit, key)
    return True


@contextmanager
def turn(key: str, what: str) -> Iterator[Callable[[], None]]:
    """Wait until no other process is in here with the same key, or until the one that is shows no sign of life.

    Writing columns is one; what is yielded gives one beside that.
    """
    lock = _folder() / f"{key}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a", encoding="utf-8")
    except OSError:  # nothing can be written there, so nobody waits either
        yield lambda: None
        return
    with file:
        pace, sign, since = Pace(wait_s=2.0), 0.0, time.monotonic()
        while not _locked(file):
            if (now := _sign_of_life(key)) != sign:
                sign, since = now, time.monotonic()
            elif time.monotonic() - since > _PATIENCE_S:
                log.warning("%s: the process that prepares it shows no progress; going on without it", what)
                break
            if pace.due():
                log.info("%s: another process prepares it; waiting for it", what)
            time.sleep(_POLL_S)
        try:
            yield lambda: os.utime(file.fileno())
        finally:
            remove(lock)


def _folder() -> Path:
    return cache_folder() / "tokens"


def limit_bytes() -> int:
    """Return the most that the folder may take. UserError if TLF_TOKENS_GIB is no number of GiB."""
    text = os.environ.get(LIMIT) or str(_DEFAULT_GIB)
    try:
        gib = float(text)
    except ValueError:
        gib = -1.0
    if not 0 <= gib < 2**30:
        raise UserError(f"environment variable {LIMIT}: expected a number of GiB, got {text!r}")
    return int(gib * 2**30)


def _write(folder: Path, dtypes: Dtypes, make: Make) -> None:
    writer = ColumnWriter(folder, dtypes)
    try:
        make(writer)
        writer.finish()
    finally:
        writer.close()


def _private(dtypes: Dtypes, make: Make) -> Columns:
    """Make columns that end with this process and those forked from it: files that have lost their names."""
    with writing(tempfile.gettempdir()), tempfile.TemporaryDirectory(prefix=TMP) as folder:
        _write(Path(folder), dtypes, make)
        return Columns(Path(folder), dtypes)


def _locked(file: TextIO) -> bool:
    """Take the lock unless another process has it. A record lock: forked workers do not inherit it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks: each makes its own
        pass
    return True


def _sign_of_life(key: str) -> float:
    """Return the time of the last write to what is being made, or to its lock."""
    return max(map(_used, [_folder() / f"{key}.lock", *_folder().glob(f"{TMP}*-{key}/*")]))


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # just renamed or removed
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # removed by another process
        return 0


def _evict(limit: int, newest: str) -> None:
    """Remove what was used longest ago, but not ``newest``, if the folder exceeds the limit."""
    entries: list[tuple[float, int, Path]] = []
    for path in _folder().iterdir():
        files = list(path.glob("*")) if path.is_dir() else []
        used = _used(path / INDEX) or max(map(_used, [path, *files]))
        if (path.suffix == ".lock" or path.name.startswith(TMP)) and time.time() - used > _STALE_S:
            remove(path)
        elif path.is_dir() and not path.name.startswith(TMP):
            entries.append((used, sum(map(_size, files)), path))
    total = sum(size for _, size, _ in entries)
    if total <= limit:
        return
    for _, size, path in sorted(entries):
        if total <= _KEEP * limit:
            break
        if path.name != newest and not _in_use(path):
            remove(path)
            total -= size


def _in_use(path: Path) -> bool:
    try:
        with (path / INDEX).open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # gone, or a file system without locks
        return False
    return False
