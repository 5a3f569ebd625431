"""A record, whatever it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tinyllava_fast.errors import DataError


class FaultError(DataError):
    """A fault of a record without its place: naming the place of every good record would be slow."""


@dataclass(frozen=True)
class Record:
    """One sample: questions and answers, about an image or not."""

    index: int
    """Position in the source, from 0."""
    id: str
    """The record's own id, or its index."""
    line: int
    """Line of the file on which the record begins, from 1; of a table its row."""
    images: tuple[str, ...]
    """Images: paths relative to the image folder, or references to pixels inside the source (formats/_embedded.py);
    empty for text alone."""
    interleaved: bool
    """True if the images are a list, so that each marker stays where it is and stands for its own image."""
    turns: tuple[tuple[str, str], ...]
    """(question, answer) pairs."""
    system: str | None = None
    """System text of its own, in place of the template's."""
    place: str = ""
    """Where it stands, in words, if that is no line."""
    extra: Mapping[str, object] | None = field(default=None, hash=False)
    """Fields of its entry that mean nothing here; kept only for those who write it again."""

    @property
    def where(self) -> str:
        """The name of this record in an error."""
        return f"record {self.index} (id {self.id!r}, {self.place or f'line {self.line}'})"
