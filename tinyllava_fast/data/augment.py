"""Random changes of training images: one affine map, reproducible from (seed, epoch, record)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
from PIL import Image, ImageChops

from tinyllava_fast.config.augment import AugmentConfig

_NONE = AugmentConfig()
_CONTENT_LEVELS = [0] * 10 + [255] * 246  # a difference below 10 of 255 is noise of the background


def augment(image: Image.Image, config: AugmentConfig, seed: Sequence[int]) -> Image.Image:
    """A changed copy of an RGB image, of the same size; the image itself if config asks for nothing.

    seed: integers that name the draw, e.g. (run seed, epoch, record index). Flips, then scaling and rotation about the
    centre and a shift, in one bilinear resampling. Uncovered pixels take the median colour of the image's
    frame.
    """
    if config == _NONE:
        return image
    draw = np.random.default_rng(list(seed)).random(6).tolist()
    if draw[0] < config.hflip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draw[1] < config.vflip:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if not (config.shift or config.scale or config.rotate):
        return image
    width, height = image.size
    fill = _frame_colour(image)
    x, y, turn, grow = (2 * value - 1 for value in draw[2:])
    x, y = x * config.shift * width, y * config.shift * height
    angle, scale = math.radians(turn * config.rotate), 1 + grow * config.scale
    if config.keep_inside:
        left, top, right, bottom = _content(image, fill)
        scale = min(scale, width / (right - left), height / (bottom - top))
        x = _inside(draw[2], left, right, width, scale, config.shift)
        y = _inside(draw[3], top, bottom, height, scale, config.shift)
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    centre_x, centre_y = width / 2, height / 2
    # The map from output to input pixels: undo the shift, then turn and scale about the centre.
    matrix = (
        cos, sin, centre_x - cos * (centre_x + x) - sin * (centre_y + y),
        -sin, cos, centre_y + sin * (centre_x + x) - cos * (centre_y + y),
    )  # fmt: skip
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill)


def _inside(draw: float, low: int, high: int, size: int, scale: float, shift: float) -> float:
    """A shift, uniform over those of at most ``shift * size`` that keep [low, high) inside [0, size) once scaled."""
    half = size / 2
    low_scaled, high_scaled = half + scale * (low - half), half + scale * (high - half)
    least, most = max(-low_scaled, -shift * size), min(size - high_scaled, shift * size)
    return least + draw * (most - least) if least <= most else (least + most) / 2


def _content(image: Image.Image, fill: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the pixels that differ from the fill; the whole image if none does."""
    difference = ImageChops.difference(image, Image.new(image.mode, image.size, fill))
    mask = difference.convert("L").point(_CONTENT_LEVELS)
    return mask.getbbox() or (0, 0, *image.size)


def _frame_colour(image: Image.Image) -> tuple[int, ...]:
    """Median colour of the corners and the middles of the edges."""
    right, bottom = image.width - 1, image.height - 1
    points = [(x, y) for x in (0, right // 2, right) for y in (0, bottom // 2, bottom)]
    points.remove((right // 2, bottom // 2))
    channels = zip(*(cast("tuple[int, ...]", image.getpixel(point)) for point in points), strict=True)
    return tuple(sorted(values)[len(values) // 2] for values in channels)
