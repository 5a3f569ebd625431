"""Image files to pixels, equal to the reference's for the modes ``square`` and ``pad``; ``anyres`` has its own file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyllava_fast.errors import DataError

ImageMode = Literal["square", "pad", "anyres"]


def load_image(path: str | Path) -> Image.Image:
    """The file as an RGB image, decoded in full. DataError for a missing, truncated or non-image file."""
    with _opened(path) as image:
        return image.convert("RGB")


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) in pixels, from the file's header alone. DataError for a missing or non-image file."""
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError as error:
        raise DataError(f"{path}: image file is missing; check the record's 'image' and data.image_folder") from error
    except Exception as error:  # decoders of damaged files raise OSError, SyntaxError, struct.error, zlib.error, ...
        raise DataError(
            f"{path}: truncated or not an image ({error}); replace it, remove its record, or set data.on_bad_image=skip"
        ) from error


def to_pixels(images: Sequence[Image.Image], processor: Any, mode: ImageMode = "square") -> Tensor:
    """Normalised pixels [n, 3, H, W] float32 of RGB images.

    processor: a transformers ``*ImageProcessorPil``. square: the processor alone (CLIP crops the centre, SigLIP
    squashes). pad: first centred on a square of the processor's mean colour. anyres: as square, for tiles that have
    been cut (anyres.tiles). No images: [0, 3, H, W].
    """
    if not images:
        return torch.zeros(0, *pixel_shape(processor))
    if mode == "pad":
        fill = tuple(int(channel * 255) for channel in processor.image_mean)
        images = [_pad(image, fill) for image in images]
    if not _is_standard(processor):
        # As PIL images: arrays one or three pixels high would be taken for channel-first ones.
        return processor(list(images), return_tensors="pt")["pixel_values"].to(torch.float32)
    table = _levels(processor)
    pixels = np.empty((len(images), *pixel_shape(processor)), np.float32)
    for image, row in zip(images, pixels, strict=True):
        array = np.asarray(_resized(image, processor))  # [H, W, 3] uint8
        for channel in range(3):
            np.take(table[channel], array[:, :, channel], out=row[channel], mode="clip")
    return torch.from_numpy(pixels)


def pixel_shape(processor: Any) -> tuple[int, int, int]:
    """(3, H, W) of the processor's output: its crop if it crops, its size if not."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    size = dict(size)
    return (3, size.get("height") or size["shortest_edge"], size.get("width") or size["shortest_edge"])


def short_edge(processor: Any) -> tuple[int, int]:
    """(width, height) that the processor resizes to before it crops, for an image of the proportions of its output."""
    size = _size(processor)
    if "shortest_edge" in size:
        return (size["shortest_edge"],) * 2
    return size["width"], size["height"]


def _is_standard(processor: Any) -> bool:
    """Whether it resizes, may crop, rescales and normalises, and nothing else: then a table does the arithmetic."""
    wanted = processor.do_resize and processor.do_rescale and processor.do_normalize
    return bool(wanted and not getattr(processor, "do_pad", False) and _known_size(processor))


def _known_size(processor: Any) -> bool:
    """Whether the size is {height, width}, or a shortest edge that the crop fits into."""
    size = _size(processor)
    if not getattr(processor, "do_center_crop", False):
        return set(size) == {"height", "width"}
    return set(size) == {"shortest_edge"} and size["shortest_edge"] >= max(pixel_shape(processor)[1:])


def _size(processor: Any) -> dict[str, int]:
    return {key: value for key, value in dict(processor.size).items() if value is not None}


def _resized(image: Image.Image, processor: Any) -> Image.Image:
    """The resize and crop of the processor, without its detour through float arrays."""
    size = _size(processor)
    if "height" in size:
        return image.resize((size["width"], size["height"]), processor.resample)
    edge = size["shortest_edge"]
    short = min(image.size)
    wide, high = (edge if side == short else int(edge * side / short) for side in image.size)
    image = image.resize((wide, high), processor.resample)
    _, height, width = pixel_shape(processor)
    left, top = (wide - width) // 2, (high - height) // 2
    return image.crop((left, top, left + width, top + height))


def _levels(processor: Any) -> np.ndarray:
    """Normalised value of each of the 256 levels of each channel, [3, 256] float32, rounded as transformers does."""
    level = (np.arange(256) * processor.rescale_factor).astype(np.float32)[None]
    mean, std = (np.array(v, np.float32)[:, None] for v in (processor.image_mean, processor.image_std))
    return (level - mean) / std


def _pad(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), fill)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas
