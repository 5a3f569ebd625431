"""Image files to pixels, equal to the reference's for the modes ``square`` and ``pad``; ``anyres`` has its own file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyllava_fast.data.pictures import UPRIGHT, Picture, PictureReading, check_header, opened, size_of, to_rgb
from tinyllava_fast.errors import DataError

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

ImageMode = Literal["square", "pad", "anyres"]
MOST_PIXELS = 2**27  # of an image made on the way: 512 MiB; longer ones come out at most one level of 255 apart


class _Settings(Protocol):
    """The settings of an image processor that this file follows; transformers' base class declares none of them."""

    size: Mapping[str, int | None]
    crop_size: Mapping[str, int | None]
    do_resize: bool
    do_rescale: bool
    do_normalize: bool
    resample: Image.Resampling
    rescale_factor: float
    image_mean: Sequence[float]
    image_std: Sequence[float]


def load_image(picture: Picture, reading: PictureReading = UPRIGHT) -> Image.Image:
    """Return the file as an RGB image, decoded in full. DataError naming the file and its fault."""
    with opened(picture) as image:
        return to_rgb(image, reading)


def image_size(picture: Picture, reading: PictureReading = UPRIGHT) -> tuple[int, int]:
    """Return (width, height) in pixels of ``load_image``'s result, from the file's header. DataError as there."""
    with opened(picture) as image:
        check_header(image)
        return size_of(image, reading)


def to_pixels(images: Sequence[Image.Image], processor: BaseImageProcessor, mode: ImageMode = "square") -> Tensor:
    """Return normalized pixels [n, 3, H, W] float32 of RGB images.

    processor: a transformers ``*ImageProcessorPil``. square: the processor alone (CLIP crops the centre, SigLIP
    squashes). pad: first centred on a square of the processor's mean colour. anyres: as square, for tiles that have
    been cut (anyres.tiles). No images: [0, 3, H, W].
    """
    return normalized(to_levels(images, processor, mode), levels_table(processor))


def to_levels(images: Sequence[Image.Image], processor: BaseImageProcessor, mode: ImageMode = "square") -> Tensor:
    """Return what ``normalized`` makes the pixels of ``to_pixels`` from: [n, 3, H, W] uint8.

    Of a processor whose normalization no table can hold they are those pixels already, float32.
    """
    settings = cast(_Settings, processor)
    if not _is_standard(settings):
        if not images:
            return torch.zeros(0, *pixel_shape(processor))
        images = [_pad(image, _fill(settings)) if mode == "pad" else image for image in images]
        # As PIL images: arrays one or three pixels high would be taken for channel-first ones.
        return processor(list(images), return_tensors="pt")["pixel_values"].to(torch.float32)
    levels = np.empty((len(images), *pixel_shape(processor)), np.uint8)
    for image, row in zip(images, levels, strict=True):
        row[:] = np.asarray(_padded(image, settings) if mode == "pad" else _resized(image, settings)).transpose(2, 0, 1)
    return torch.from_numpy(levels)


def levels_table(processor: BaseImageProcessor) -> Tensor | None:
    """Return the normalized value of each of 256 levels of each channel, [3, 256] float32, rounded as transformers.

    None for a processor that does more with pixels than that.
    """
    settings = cast(_Settings, processor)
    if not _is_standard(settings):
        return None
    level = (np.arange(256) * settings.rescale_factor).astype(np.float32)[None]
    mean, std = (np.array(v, np.float32)[:, None] for v in (settings.image_mean, settings.image_std))
    return torch.from_numpy((level - mean) / std)


def normalized(levels: Tensor, table: Tensor | None) -> Tensor:
    """Return pixels [n, 3, H, W] float32 of levels of any device; without a table they are pixels already."""
    if table is None:
        return levels
    if levels.device.type != "cpu":
        return _looked_up(levels, table.to(levels.device, non_blocking=True))
    pixels = torch.empty(levels.shape, dtype=torch.float32)
    for row, out in zip(levels.numpy(), pixels.numpy(), strict=True):
        for channel in range(3):
            np.take(table[channel].numpy(), row[channel], out=out[channel], mode="clip")
    return pixels


def _looked_up(levels: Tensor, table: Tensor) -> Tensor:
    """Return what ``normalized`` does; on a CPU it takes longer, for torch wants indices of four bytes."""
    return torch.stack([table[channel][levels[:, channel].int()] for channel in range(3)], 1)


def check_shape(image: Image.Image, processor: BaseImageProcessor, mode: ImageMode) -> None:
    """Raise DataError for a picture so much like a line that this processor would need gigabytes for it."""
    settings = cast(_Settings, processor)
    if _is_standard(settings):
        return
    sides = sorted(image.size)
    edge = _size(settings).get("shortest_edge", 1)
    most = sides[1] ** 2 if mode == "pad" else edge * max(edge, edge * sides[1] // sides[0])
    if most > max(MOST_PIXELS, sides[0] * sides[1]):
        raise DataError(
            f"a picture of {image.width} x {image.height} pixels is too much like a line: resized for this model it "
            f"would have {most:,} pixels; crop it"
        )


def pixel_shape(processor: BaseImageProcessor) -> tuple[int, int, int]:
    """Return (3, H, W) of the processor's output: its crop if it crops, its size if not."""
    return 3, *_shape(cast(_Settings, processor))


def short_edge(processor: BaseImageProcessor) -> tuple[int, int]:
    """Return (width, height) that the processor resizes to before it crops, given an image shaped like its output."""
    size = _size(cast(_Settings, processor))
    if "shortest_edge" in size:
        return (size["shortest_edge"],) * 2
    return size["width"], size["height"]


Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels of a picture; what lies beyond its edges is padding."""


def seen_box(size: tuple[int, int], processor: BaseImageProcessor, mode: ImageMode = "square") -> Box:
    """Return the part of a picture of this size, (width, height), that ``to_pixels`` makes its pixels of."""
    settings = cast(_Settings, processor)
    width, height = size
    left, top = 0.0, 0.0
    if mode == "pad":
        side = max(size)
        left, top = float(-((side - width) // 2)), float(-((side - height) // 2))
        width = height = side
    if not getattr(processor, "do_center_crop", False):
        return left, top, left + width, top + height
    edge = _size(settings).get("shortest_edge")
    across, down = _shape(settings)[1], _shape(settings)[0]
    if edge is None:
        wide, high = _size(settings)["width"], _size(settings)["height"]
    else:
        short = min(width, height)
        wide, high = (edge if side == short else int(edge * side / short) for side in (width, height))
    x, y = width / wide, height / high  # pixels of the picture, one of the resized one
    left, top = left + (wide - across) // 2 * x, top + (high - down) // 2 * y
    return left, top, left + across * x, top + down * y


def blank_image(processor: BaseImageProcessor, size: int) -> Image.Image:
    """Return an image of the processor's mean colour: all zeros once normalized."""
    mean = getattr(processor, "image_mean", None) or (0.5, 0.5, 0.5)
    return Image.new("RGB", (size, size), tuple(int(255 * m) for m in mean))


def _is_standard(processor: _Settings) -> bool:
    """Return True if it resizes, may crop, rescales and normalizes, no more: then a table does the arithmetic."""
    wanted = processor.do_resize and processor.do_rescale and processor.do_normalize
    return bool(wanted and not getattr(processor, "do_pad", False) and _known_size(processor))


def _known_size(processor: _Settings) -> bool:
    """Return True if the size is {height, width}, or a shortest edge that the crop fits into."""
    size = _size(processor)
    if not getattr(processor, "do_center_crop", False):
        return set(size) == {"height", "width"}
    return set(size) == {"shortest_edge"} and size["shortest_edge"] >= max(_shape(processor))


def _size(processor: _Settings) -> dict[str, int]:
    return _given(processor.size)


def _given(size: Mapping[str, int | None]) -> dict[str, int]:
    return {key: value for key, value in dict(size).items() if value is not None}


def _shape(processor: _Settings) -> tuple[int, int]:
    """Return (H, W) of the processor's output."""
    size = _given(processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size)
    height, width = (size.get(side) or size["shortest_edge"] for side in ("height", "width"))
    return height, width


def _resized(image: Image.Image, processor: _Settings) -> Image.Image:
    """Resize and crop as the processor does, without its detour through float arrays."""
    size = _size(processor)
    if "height" in size:
        return image.resize((size["width"], size["height"]), processor.resample)
    edge = size["shortest_edge"]
    short = min(image.size)
    wide, high = (edge if side == short else int(edge * side / short) for side in image.size)
    height, width = _shape(processor)
    left, top = (wide - width) // 2, (high - height) // 2
    corners = (left, top, left + width, top + height)
    if wide * high > MOST_PIXELS:  # like a line: only what the crop keeps is made, first its columns, then its rows
        across, down = image.width / wide, image.height / high
        first, last = corners[1] * down, corners[3] * down
        margin = 8 * math.ceil(max(down, 1))  # of rows that the filter looks at
        upper, lower = max(0, math.floor(first) - margin), min(image.height, math.ceil(last) + margin)
        columns = (corners[0] * across, upper, corners[2] * across, lower)
        image = image.resize((width, lower - upper), processor.resample, columns)
        return image.resize((width, height), processor.resample, (0, first - upper, width, last - upper))
    return image.resize((wide, high), processor.resample).crop(corners)


def _padded(image: Image.Image, processor: _Settings) -> Image.Image:
    """Pad the image to a square, then resize and crop it as the processor does."""
    side = max(image.size)
    if side * side <= MOST_PIXELS or image.width == image.height:
        return _resized(_pad(image, _fill(processor)), processor)
    size = _size(processor)
    width, height = size.get("width") or size["shortest_edge"], size.get("height") or size["shortest_edge"]
    # Like a line: its long side is resized before it is padded, the other one afterwards.
    if image.width > image.height:
        squeezed, canvas = image.resize((width, image.height), processor.resample), (width, side)
    else:
        squeezed, canvas = image.resize((image.width, height), processor.resample), (side, height)
    square = Image.new("RGB", canvas, _fill(processor))
    square.paste(squeezed, ((canvas[0] - squeezed.width) // 2, (canvas[1] - squeezed.height) // 2))
    return _resized(square.resize((width, height), processor.resample), processor)


def _fill(processor: _Settings) -> tuple[int, ...]:
    """The mean colour, in levels."""
    return tuple(int(channel * 255) for channel in processor.image_mean)


def _pad(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), fill)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas
