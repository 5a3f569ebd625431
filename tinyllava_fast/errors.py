"""Exceptions whose text is for people: commands print it and exit with 2 for what is wrong until somebody mends it.

Code 1 is for what may be over at the next try: a lost process, a full disk.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

_REMEDIES = {
    errno.ENOSPC: "free some space there and run the same command again",
    errno.EDQUOT: "free some space there and run the same command again",
    errno.ENOENT: "a folder on the way to it is not there; make it, or name another folder",
    errno.ENOTDIR: "a part of that path is a file; name another folder",
    errno.EEXIST: "a file has the name of that folder; name another folder",
    errno.EISDIR: "a folder has the name of that file; remove it or name another folder",
    errno.ENAMETOOLONG: "shorten the name",
}


class UserError(ValueError):
    """Something a user can mend: a config key, a file, a record. The text says where, what and how."""


class CheckpointError(UserError):
    """A checkpoint that is missing, truncated, or of another architecture."""


class DataError(UserError):
    """A record or image that cannot be used; names the file, the record and the field."""


class ShortageError(UserError):
    """Disk, memory or a helping process that failed: the same command may succeed without a change."""


class LostError(RuntimeError):
    """Another process of the run is gone, and this one cannot go on without it. The text says which, and why.

    stop: the signal that asked it to stop; 0: none did.
    """

    def __init__(self, text: str, stop: int = 0) -> None:
        super().__init__(text)
        self.stop = stop


class Interruption(BaseException):
    """A signal asked this process to stop. number: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class SaidError(Exception):
    """An error that another process of the run has told. exit_code: of the command."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Around code that writes ``path``, a file or folder: UserError, which says why and what to do, for an OSError.

    The message names the file that the system complained about, if it named one, else ``path``.
    """
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        reason = os.strerror(number) if number else str(error) or type(error).__name__
        remedy = _REMEDIES.get(number, "check the disk and the permissions, or name another folder")
        name = error.filename2 or error.filename or path  # of two, the second is what the first was to replace
        raise UserError(f"{name}: cannot be written: {reason}; {remedy}") from error


def import_optional(module: str, what: str, extra: str = "train") -> ModuleType:
    """Return a module of an extra. Raise UserError if it does not import. what: its user, for messages."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what} needs {module}, which does not import ({error}); pip install 'tinyllava-fast[{extra}]'"
        ) from None


class LazyModule:
    """A package that is imported when something of it is first used; UserError then, if it is not there."""

    def __init__(self, module: str, what: str, extra: str = "train") -> None:
        self._asked = module, what, extra

    def __getattr__(self, name: str) -> Any:
        return getattr(import_optional(*self._asked), name)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence fragment for an unknown name: the nearest match if there is one, and all known names.

    >>> nearest("mpl", ["linear", "mlp"])
    "did you mean 'mlp'? Known: linear, mlp"
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names) or '(none)'}"
