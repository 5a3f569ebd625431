"""Images in tiles, the mode ``anyres``: the whole image, then tiles of an enlarged copy, each an input of the tower.

LLaVA-1.6 (https://llava-vl.github.io/blog/2024-01-30-llava-next/) with its features laid flat: an image takes
(tiles + 1) * K positions, and neither the batch nor the model know of tiles. Sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from tinyllava_fast.data.images import Box, pixel_shape, seen_box, short_edge
from tinyllava_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

Size = tuple[int, int]
_DEFAULT = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))  # tiles across and down


def tile_size(processor: BaseImageProcessor) -> Size:
    """Return (width, height) of a tile: the pixels that the tower takes at once."""
    _, height, width = pixel_shape(processor)
    return width, height


def resolve_grid(grid: Sequence[Size], processor: BaseImageProcessor) -> list[Size]:
    """Return the resolutions that images may be enlarged to; none given: LLaVA-1.6's shapes, in tiles of this tower.

    UserError for one that is not made of whole tiles.
    """
    width, height = tile_size(processor)
    for wide, high in grid:
        if wide < 1 or high < 1 or wide % width or high % height:
            raise UserError(
                f"data.image_grid: {[wide, high]} is no multiple of the tower's {[width, height]} pixels; give "
                f"[width, height] pairs such as {[2 * width, height]}"
            )
    return [(int(w), int(h)) for w, h in grid] or [(x * width, y * height) for x, y in _DEFAULT]


def best_resolution(size: Size, grid: Sequence[Size]) -> Size:
    """Return the resolution that keeps most pixels of the image; of equals the one with least waste, then the first."""

    def fit(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[0] / size[0], resolution[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - resolution[0] * resolution[1]

    return max(grid, key=fit)


def count_inputs(size: Size, grid: Sequence[Size], tile: Size) -> int:
    """Return the number of tower inputs that an image of this size becomes: its tiles and the whole."""
    width, height = best_resolution(size, grid)
    return (width // tile[0]) * (height // tile[1]) + 1


def tiles(image: Image.Image, grid: Sequence[Size], processor: BaseImageProcessor) -> list[Image.Image]:
    """Return the whole image squeezed to a square, then the tiles row by row; all for the mode ``square``.

    The enlarged copy keeps its proportions and is centred on black.
    """
    target = best_resolution(image.size, grid)
    size = _enlarged(image.size, target)
    canvas = Image.new("RGB", target, (0, 0, 0))
    canvas.paste(image.resize(size), ((target[0] - size[0]) // 2, (target[1] - size[1]) // 2))
    width, height = tile_size(processor)
    corners = [(x, y) for y in range(0, target[1], height) for x in range(0, target[0], width)]
    whole = image.resize(short_edge(processor))
    return [whole, *(canvas.crop((x, y, x + width, y + height)) for x, y in corners)]


def input_boxes(size: Size, grid: Sequence[Size], processor: BaseImageProcessor) -> list[Box]:
    """Return the part of a picture of this size that each of ``tiles`` shows; what lies beyond its edges is black."""
    target = best_resolution(size, grid)
    enlarged = _enlarged(size, target)
    x, y = size[0] / enlarged[0], size[1] / enlarged[1]  # pixels of the picture, one of the enlarged copy
    left, top = (target[0] - enlarged[0]) // 2, (target[1] - enlarged[1]) // 2
    width, height = tile_size(processor)
    seen = seen_box((width, height), processor)  # a processor that crops crops tiles, too
    corners = [(a - left, d - top) for d in range(0, target[1], height) for a in range(0, target[0], width)]
    edge = short_edge(processor)
    whole = tuple(at * size[n % 2] / edge[n % 2] for n, at in enumerate(seen_box(edge, processor)))
    return [
        whole,  # type: ignore[list-item]
        *(((a + seen[0]) * x, (d + seen[1]) * y, (a + seen[2]) * x, (d + seen[3]) * y) for a, d in corners),
    ]


def _enlarged(size: Size, target: Size) -> Size:
    """Return the largest size of these proportions that a resolution has room for."""
    by_width, by_height = (goal / side for goal, side in zip(target, size, strict=True))
    if by_width < by_height:
        return target[0], min(math.ceil(size[1] * by_width), target[1])
    return min(math.ceil(size[0] * by_height), target[0]), target[1]
