"""A part of a data set held out for validation: by image, so that no picture is on both sides.

Which images are held out follows from their names alone: not from the seed, the order of the records or the folder
that they lie in. Stages and runs with the same share hold out the same ones.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass

_ALL = 2.0**64


@dataclass(frozen=True)
class Split:
    """One side of a data set that is split by image. share: of the images on the side that is held out."""

    share: float
    held_out: bool

    def takes(self, names: Sequence[str]) -> bool:
        """Return whether a record is on this side. names: of its images; without any, what stands for its text.

        One that shows pictures of both sides is on neither.
        """
        held = [place_of(posixpath.normpath(name)) < self.share for name in names]
        return all(held) if self.held_out else not any(held)


def place_of(key: str) -> float:
    """Return a number from 0 up to 1 that the text alone decides."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / _ALL
