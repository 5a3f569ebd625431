"""What ``tlf-train --nproc`` and the processes of its attempts tell one another: by the environment, and by a file."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LAUNCHED, ATTEMPT, REFUSED = "TLF_LAUNCHED_NS", "TLF_ATTEMPT", "TLF_REFUSED"
"""Environment variables: when the launcher began, the number of the attempt (0, 1, ...), the file of a refusal."""


class Attempts:
    """The launcher's side. refused: whether a process of any attempt has refused (exit code 2)."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @property
    def refused(self) -> bool:
        """Whether one has; torchrun names only those that had ended when it first looked."""
        return self._file.exists()

    def begin(self, number: int) -> None:
        """Tell the processes that start now which attempt they are."""
        os.environ[ATTEMPT] = str(number)


@contextmanager
def launching() -> Iterator[Attempts]:
    """Around all attempts; afterwards nothing of it is left in the environment, or on the disk."""
    with tempfile.TemporaryDirectory(prefix="tlf-launch-", ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "refused"
        os.environ |= {LAUNCHED: str(time.time_ns()), REFUSED: str(file)}
        try:
            yield Attempts(file)
        finally:
            for name in (LAUNCHED, ATTEMPT, REFUSED):
                os.environ.pop(name, None)


def launched() -> int | None:
    """Return when the launcher of this process began, in ns of the system's clock; None without a launcher."""
    text = os.environ.get(LAUNCHED, "")
    return int(text) if text.isdigit() else None


def attempt() -> int:
    """Return the number of this process's attempt; 0 without a launcher."""
    text = os.environ.get(ATTEMPT, "")
    return int(text) if text.isdigit() else 0


def note_refusal() -> None:
    """Tell the launcher, if there is one, that this process refuses."""
    if path := os.environ.get(REFUSED):
        with suppress(OSError):  # the exit code says the same, in most cases
            Path(path).touch()
