"""The one exception that means "the input is wrong": commands print its text and exit with 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something a user can mend: a config key, a file, a record. The text says where, what and how."""


class CheckpointError(UserError):
    """A checkpoint that is missing, truncated, or of another architecture."""


class DataError(UserError):
    """A record or image that cannot be used; names the file, the record and the field."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence fragment for an unknown name: the nearest match if there is one, and all known names.

    >>> nearest("mpl", ["linear", "mlp"])
    "did you mean 'mlp'? Known: linear, mlp"
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names) or '(none)'}"
