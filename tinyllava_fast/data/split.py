"""A part of a data set held out for validation: by image, so that no picture is on both sides.

Which images are held out follows from their names alone: not from the seed, the order of the records or the folder
that they lie in. Stages and runs with the same share hold out the same ones.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass

from tinyllava_fast.data.records import Record, read_records

_ALL = 2.0**64


@dataclass(frozen=True)
class Split:
    """One side of a data set that is split by image. share: of the images on the side that is held out."""

    share: float
    held_out: bool

    def takes(self, record: Record) -> bool:
        """Return whether a record is on this side.

        One that shows pictures of both sides is on neither. One without pictures goes by its text, so that two records
        of the same text stay together.
        """
        keys = [posixpath.normpath(name) for name in record.images] or ["\0".join(map("\n".join, record.turns))]
        held = [place_of(key) < self.share for key in keys]
        return all(held) if self.held_out else not any(held)


def taken(path: str, split: Split | None) -> Iterator[Record]:
    """Yield the records of a file that are on a side of the split, in order; None: all of them."""
    records = read_records(path)
    return records if split is None else filter(split.takes, records)


def place_of(key: str) -> float:
    """Return a number from 0 up to 1 that the text alone decides."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / _ALL
