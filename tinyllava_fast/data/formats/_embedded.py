"""References to images that lie inside a source: in a table, an archive, or a data URI. Pixels are read when needed.

A reference is a text that no path can be, for it begins with NUL; it stands wherever an image path may. It names the
file relative to the source, so that a data set may move.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import unquote_to_bytes

from tinyllava_fast.data.formats._base import RECORD_FORMATS, Place
from tinyllava_fast.data.pictures import MissingImageError
from tinyllava_fast.errors import DataError
from tinyllava_fast.fields import shown

_SIGN = "\0"


def is_reference(image: str) -> bool:
    """Return whether an image of a record is a reference, not a path."""
    return image.startswith(_SIGN)


@dataclass(frozen=True)
class Embedded:
    """An image inside a file. address, place: see ``RecordFormat.image``."""

    format: str
    file: str
    address: tuple[int, ...]
    place: Place

    def __str__(self) -> str:
        """Return its name for a message."""
        numbers = ", ".join(map(str, self.address))
        inside = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in self.place).lstrip(".")
        return f"{self.file} at {numbers}" + (f", {inside}" if inside else "")

    def reference(self, base: Path) -> str:
        """Return the reference. base: the folder that the source's files are relative to."""
        file = os.path.relpath(self.file, base)
        return _SIGN + json.dumps([self.format, file, self.address, self.place], ensure_ascii=False)

    def read(self) -> bytes:
        """Return the bytes of the image file. DataError naming the place for what cannot be read or is no image."""
        try:
            value = RECORD_FORMATS.get(self.format).image(Path(self.file), self.address, self.place)
        except FileNotFoundError as error:
            raise MissingImageError(f"{self}: the file is missing") from error
        except (OSError, LookupError, ValueError, TypeError) as error:
            raise DataError(f"{self}: cannot be read ({error}); has the file changed?") from error
        if isinstance(value, str):
            return _decoded(value, str(self))
        if not isinstance(value, bytes):
            raise DataError(f"{self}: expected the bytes of an image, got {shown(value)}; has the file changed?")
        return value


def picture_of(image: str, folder: str, base: Path) -> str | Embedded:
    """Return an image of a record: the path in its folder, or what a reference names inside the source's ``base``."""
    if not is_reference(image):
        return os.path.join(folder, image)
    name, file, address, place = cast("tuple[str, str, list[int], list[str | int]]", json.loads(image[len(_SIGN) :]))
    return Embedded(name, os.path.normpath(base / file), tuple(address), tuple(place))


def _decoded(uri: str, name: str) -> bytes:
    """Return the content of a data URI (RFC 2397)."""
    head, comma, body = uri.partition(",")
    if not head.startswith("data:") or not comma:
        raise DataError(f"{name}: expected a data URI, data:image/png;base64,..., got {shown(uri)}")
    if not head.endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{name}: a data URI whose base64 is damaged ({error}); write it again") from None


def walk(value: object, place: Place) -> object:
    """Return what lies at a place of decoded values. LookupError or TypeError if nothing does."""
    for step in place:
        value = value[step]  # type: ignore[index]
    return value
