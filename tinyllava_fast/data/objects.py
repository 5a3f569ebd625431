"""What people hand over as an image in Python, as a path or a PIL image, or a DataError that says what to give."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from tinyllava_fast.data.pictures import open_bytes
from tinyllava_fast.errors import DataError


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """An image whose pixels have been read. pixels: RGB, upright. digest: equal for equal pixels of equal size."""

    pixels: Image.Image
    digest: bytes

    @classmethod
    def of(cls, pixels: Image.Image) -> DecodedImage:
        """Return the image with the digest of its mode, size and pixels."""
        digest = hashlib.blake2b(f"{pixels.mode} {pixels.size} ".encode(), digest_size=16)
        digest.update(pixels.tobytes())
        return cls(pixels, digest.digest())


ImageLike = str | Path | Image.Image | DecodedImage
ImageInput = ImageLike | np.ndarray | bytes | bytearray | memoryview | BinaryIO

_EXPECTED = "give a path, a PIL image, a NumPy array, the bytes of an image file, or such a file opened with 'rb'"


def image_objects(value: Any) -> ImageLike | tuple[ImageLike, ...] | None:
    """An image, or a list of images, in the forms that the engine takes; None stays None.

    A NumPy array is uint8, [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (RGB, the fourth channel its alpha). Paths are not
    looked at yet. DataError for anything else.
    """
    if isinstance(value, (list, tuple)):
        return tuple(_one(item, f"image {number} of the list") for number, item in enumerate(value))
    return None if value is None else _one(value, "the image")


def _one(value: Any, name: str) -> ImageLike:
    if isinstance(value, (str, Path, Image.Image, DecodedImage)):
        return value
    if isinstance(value, os.PathLike):
        return Path(os.fsdecode(value))
    if isinstance(value, np.ndarray):
        return _from_array(value, name)
    if isinstance(value, torch.Tensor):
        raise DataError(
            f"{name}: a torch tensor of {list(value.shape)} says neither the order of its axes nor its range; give a "
            "NumPy array, uint8 of [H, W, 3]: (tensor * 255).round().byte().permute(1, 2, 0).numpy() for [3, H, W] in "
            "0..1"
        )
    if isinstance(value, (bytes, bytearray, memoryview)):
        return open_bytes(bytes(value), f"{name} of {len(value):,} bytes")
    if callable(getattr(value, "read", None)):
        return _from_file(value, name)
    raise DataError(f"{name}: got {type(value).__name__}; {_EXPECTED}")


def _from_file(file: Any, name: str) -> Image.Image:
    try:
        content = file.read()
    except (OSError, ValueError) as error:  # closed, opened for writing, or a text that is no UTF-8
        raise DataError(f"{name}: the file object cannot be read: {error}; {_EXPECTED}") from error
    if not isinstance(content, bytes):
        raise DataError(f"{name}: the file object gives {type(content).__name__}, not bytes; open the file with 'rb'")
    if not content:
        raise DataError(f"{name}: the file object has nothing left to read; open it again, or seek(0) first")
    return open_bytes(content, f"{name} of {len(content):,} bytes")


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    found = f"a NumPy array of {array.dtype} {list(array.shape)}"
    wanted = "give uint8 of [H, W, 3], [H, W, 4] or [H, W]"
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        first = ": .transpose(1, 2, 0)" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise DataError(f"{name}: {found} is no picture; {wanted}{first}")
    if array.dtype != np.uint8:
        hint = "; (array * 255).round().astype('uint8') if it is in 0..1" if array.dtype.kind == "f" else ""
        raise DataError(f"{name}: {found} has no certain range; {wanted}{hint}")
    if not array.size:
        raise DataError(f"{name}: {found} shows nothing")
    return Image.fromarray(array.copy())
