"""The images of a set as numbers: size, content, and a hash of what is seen, by which copies and near copies are found.

The perceptual hash is the difference hash: of the picture shrunk to 9 x 8 grey values, whether each is darker than its
right neighbour by more than a level or two. Two pictures are near copies where at most ``NEAR`` of 64 bits differ and
the colours of 4 x 4 parts of them are alike: saved again, resized, or a little retouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image

from tinyllava_fast.data.formats._embedded import Embedded, picture_of
from tinyllava_fast.data.pictures import UPRIGHT, open_bytes, to_rgb
from tinyllava_fast.log import log
from tinyllava_fast.pace import Pace

ROW = np.dtype(
    [("content", "<u8"), ("seen", "<u8"), ("cells", "u1", 48), ("width", "<i4"), ("height", "<i4"), ("bytes", "<i8")]
)
"""Of an image: digest of its bytes, perceptual hash, colours of its parts, size in pixels (0: unreadable), bytes."""
NEAR = 5
"""Bits that perceptual hashes of near copies may differ in."""
_COLOUR = 20  # levels that the colours of parts of near copies may be apart
_WINDOW = 512  # pictures of like hash and brightness that each is compared with
_MARGIN = 2  # levels of grey that are no difference: noise of JPEG in a plain area
_BANDS = ((0, 11), (11, 11), (22, 11), (33, 11), (44, 10), (54, 10))
"""First bit and width of parts of a hash, one more than NEAR: where at most NEAR bits differ, one part is equal."""


def look(name: str, folder: str, base: Path) -> np.ndarray:
    """Return the row of an image, [] of ROW; all zeros for one that cannot be read. name, base: see picture_of."""
    row = np.zeros((), ROW)
    picture = picture_of(name, folder, base)
    try:
        content = picture.read() if isinstance(picture, Embedded) else Path(picture).read_bytes()
        row["content"], row["bytes"] = digest(content), len(content)
        with open_bytes(content, name) as image:
            width, height = image.size
            image.draft("RGB", (72, 64))  # of a JPEG only as many coefficients as are needed
            small = to_rgb(image, UPRIGHT).resize((36, 32), Image.Resampling.BOX, reducing_gap=2.0)
    except Exception:  # decoders of damaged files raise SyntaxError, struct.error, zlib.error, ...
        return row
    row["width"], row["height"] = width, height
    pixels = np.asarray(small, np.int32)
    grey = (pixels @ np.array([299, 587, 114])).reshape(8, 4, 9, 4).mean((1, 3)) / 1000
    row["seen"] = np.packbits(grey[:, 1:] - grey[:, :-1] > _MARGIN).view("<u8")[0]
    row["cells"] = pixels.reshape(4, 8, 4, 9, 3).mean((1, 3)).round().reshape(-1)
    return row


def digest(content: bytes) -> int:
    """Return 64 bits that tell contents apart."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def near_groups(rows: np.ndarray) -> np.ndarray:
    """Return the number of the group of near copies of each image: [n] int64, that of its first member.

    rows: [n] of ROW, images that can be read. A near copy of a member is a member. Among thousands of pictures of like
    hash and brightness, as plain graphics are, each is compared with its _WINDOW nearest in brightness only.
    """
    if not len(rows):
        return np.zeros(0, np.int64)
    keys = np.ascontiguousarray(rows[["seen", "cells"]]).astype([("seen", "<u8"), ("cells", "u1", 48)])
    _, first, inverse = np.unique(keys.view("V56").reshape(-1), return_index=True, return_inverse=True)
    chosen = rows[first]
    groups = np.arange(len(chosen))

    def top(number: int) -> int:
        while (above := groups[number]) != number:
            groups[number] = groups[above]
            number = above
        return number

    for one, other in _pairs(chosen["seen"], chosen["cells"].astype(np.int16), groups):
        low, high = sorted((top(one), top(other)), key=lambda number: first[number])
        groups[high] = low
    tops = np.array([top(number) for number in range(len(chosen))], np.int64)
    return first[tops][inverse.reshape(-1)]


def _pairs(seen: np.ndarray, cells: np.ndarray, groups: np.ndarray) -> Iterable[tuple[int, int]]:
    """Yield pairs of images that look alike. cells: [n, 48] int16.

    groups: [n] of each another one of its group, or itself; pairs that it joins by then are left out, which of plain
    graphics are nearly all.
    """
    bright = cells.mean(1)
    pace = Pace(wait_s=5.0)
    for number, (first, width) in enumerate(_BANDS):
        part = (seen >> np.uint64(first)) & np.uint64((1 << width) - 1)
        order = np.lexsort((bright, part))
        part, level = part[order], bright[order]
        alive = np.arange(len(part))
        for apart in range(1, _WINDOW + 1):
            alive = alive[: np.searchsorted(alive, len(part) - apart)]
            alive = alive[part[alive] == part[alive + apart]]
            alive = alive[level[alive + apart] - level[alive] <= _COLOUR]
            if not len(alive):
                break
            if pace.due():
                log.info("images that look alike: pass %d of %d, %d of at most %d comparisons of each", number + 1,
                         len(_BANDS), apart, _WINDOW)  # fmt: skip
            tops = _tops(groups)
            left, right = order[alive], order[alive + apart]
            apart_still = tops[left] != tops[right]
            left, right = left[apart_still], right[apart_still]
            close = _bits(seen[left] ^ seen[right]) <= NEAR
            left, right = left[close], right[close]
            alike = np.abs(cells[left] - cells[right]).max(1, initial=0) <= _COLOUR
            ends = np.unique(np.stack([tops[left[alike]], tops[right[alike]]], 1), axis=0)
            yield from map(tuple, ends.tolist())


def _tops(groups: np.ndarray) -> np.ndarray:
    """Return the first member of the group of each image, [n]. groups: see ``_pairs``."""
    while not np.array_equal(above := groups[groups], groups):
        groups = above
    return groups


def _bits(values: np.ndarray) -> np.ndarray:
    """Return how many bits of each are set."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(values)
    return np.unpackbits(np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8), axis=1).sum(1)


def rows_of(found: Sequence[np.ndarray]) -> np.ndarray:
    """Return parts of rows as one array."""
    return np.concatenate([np.zeros(0, ROW), *found])
