"""A part of a data set held out for validation: by image, so that no picture is on both sides.

Which images are held out follows from their keys alone (``image_key``): not from the seed, the order of the records or
the folder that they lie in. Stages and runs with the same share hold out the same ones.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllava_fast.data.formats._embedded import Embedded, picture_of
from tinyllava_fast.errors import DataError

_ALL = 2.0**64


def image_key(name: str, base: Path) -> str:
    """Return what an image is known by: its path, ./a.jpg as a.jpg; inside a source, its bytes, wherever they stand.

    name, base: see picture_of. One inside a source that cannot be read is known by its place.
    """
    picture = picture_of(name, "", base)
    if not isinstance(picture, Embedded):
        return posixpath.normpath(name)
    try:
        return f"bytes {hashlib.blake2b(picture.read(), digest_size=16).hexdigest()}"
    except DataError:
        return name


@dataclass(frozen=True)
class Split:
    """One side of a data set that is split by image. share: of the images on the side that is held out."""

    share: float
    held_out: bool

    def takes(self, keys: Sequence[str]) -> bool:
        """Return whether a record is on this side. keys: of its images; without any, what stands for its text.

        One that shows pictures of both sides is on neither.
        """
        held = [self.holds(key) for key in keys]
        return all(held) if self.held_out else not any(held)

    def holds(self, key: str) -> bool:
        """Return whether an image of this key is held out."""
        return place_of(key) < self.share


def place_of(key: str) -> float:
    """Return a number from 0 up to 1 that the text alone decides."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / _ALL
