"""A part of a data set held out for validation: by image, so that no picture is on both sides.

Which images are held out follows from their keys alone (``image_key``): not from the seed, the order of the records or
the folder that they lie in. Stages and runs with the same share hold out the same ones.
"""

from __future__ import annotations

import hashlib
import posixpath
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tinyllava_fast.data import shelf
from tinyllava_fast.data.columns import ColumnWriter
from tinyllava_fast.data.formats._base import base_of
from tinyllava_fast.data.formats._embedded import Embedded, is_reference, picture_of
from tinyllava_fast.data.store import SampleStore
from tinyllava_fast.data.workers import in_order
from tinyllava_fast.errors import DataError
from tinyllava_fast.hardware import cores
from tinyllava_fast.log import log
from tinyllava_fast.pace import Pace

_ALL = 2.0**64
_DIGEST = 16
_CONTENT = np.dtype([("digest", "u1", (_DIGEST,)), ("read", "?")])
_PART = 256  # images read together
_MANY = 2048  # images for which processes repay


def image_key(name: str, base: Path) -> str:
    """Return what an image is known by: its path, ./a.jpg as a.jpg; inside a source, its bytes, wherever they stand.

    name, base: see picture_of. One inside a source that cannot be read is known by its place.
    """
    return _key(name, _content(name, base) if is_reference(name) else None)


def keys_of(store: SampleStore, numbers: np.ndarray, records: str) -> Iterator[str]:
    """Yield the key (``image_key``) of some of the images of a store. numbers: theirs, always the same of a store.

    records: the source. Images inside it are read once, by all cores if they are many; digests of them are kept beside
    the tokens, for other processes and later starts.
    """
    if not any(is_reference(store.image(number)) for number in numbers.tolist()):
        yield from (_key(store.image(number), None) for number in numbers.tolist())
        return
    make = partial(_digest_all, store, numbers, records)
    digests = shelf.take(f"contents-{store.key or secrets.token_hex(20)}", {"contents": _CONTENT}, make, records)
    for number, row in zip(numbers.tolist(), digests["contents"], strict=True):
        yield _key(store.image(number), row["digest"].tobytes() if row["read"] else None)


def _digest_all(store: SampleStore, numbers: np.ndarray, records: str, columns: ColumnWriter) -> None:
    """Write a row of _CONTENT for each image."""
    parts = [numbers[at : at + _PART] for at in range(0, len(numbers), _PART)]
    pace, done = Pace(wait_s=5.0), 0
    digest = partial(_digest_some, store, base_of(records))
    for part in in_order(digest, parts, cores() if len(numbers) >= _MANY and cores() > 1 else 0):
        columns.append("contents", part)
        done += len(part)
        if pace.due():
            log.info("%s: %d of %d images read, to know them by their content", records, done, len(numbers))


def _digest_some(store: SampleStore, base: Path, numbers: np.ndarray) -> np.ndarray:
    rows = np.zeros(len(numbers), _CONTENT)
    for at, number in enumerate(numbers.tolist()):
        if (content := _content(store.image(number), base)) is not None:
            rows[at] = (np.frombuffer(content, np.uint8), True)
    store.let_go()
    return rows


def _content(name: str, base: Path) -> bytes | None:
    """Return a digest of the bytes of an image inside a source; None for another one, or if it cannot be read."""
    picture = picture_of(name, "", base)
    if not isinstance(picture, Embedded):
        return None
    try:
        return hashlib.blake2b(picture.read(), digest_size=_DIGEST).digest()
    except DataError:
        return None


def _key(name: str, content: bytes | None) -> str:
    """Return the key of an image. content: the digest of its bytes; None for one that has none."""
    if not is_reference(name):
        return posixpath.normpath(name)
    return name if content is None else f"bytes {content.hex()}"


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
