"""The lines that were typed at a prompt, kept for the next time, for their user alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tinyllava_fast.hardware import cache_folder
from tinyllava_fast.log import log

LINES = 1000
_PRIVATE = 0o600


@contextmanager
def kept_lines(name: str) -> Iterator[None]:
    """Give input() arrow keys and the lines of earlier sessions; on leaving, add those of this one to the file.

    name: of the file in the cache folder. Without readline there is neither.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    path = cache_folder() / name
    readline.set_history_length(LINES)
    with suppress(OSError):
        readline.read_history_file(path)
    before = readline.get_current_history_length()
    try:
        yield
    finally:
        try:
            _make_private(path)
            readline.append_history_file(max(readline.get_current_history_length() - before, 0), path)
        except OSError as error:
            log.warning("%s: the lines that were typed are not kept: %s", path, error.strerror)


def _make_private(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, _PRIVATE)
    try:
        os.fchmod(descriptor, _PRIVATE)
    finally:
        os.close(descriptor)
