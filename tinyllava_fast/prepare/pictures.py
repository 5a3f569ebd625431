"""The images of a set as numbers: size, content, and a hash of what is seen, by which copies and near copies are found.

The perceptual hash is the difference hash: of the picture shrunk to 9 x 8 grey values, whether each is darker than its
right neighbour by more than a level or two. Two pictures are near copies where at most ``NEAR`` of 64 bits differ and
their mean colours are alike: saved again, resized, or a little retouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image

from tinyllava_fast.data.formats._embedded import Embedded, picture_of
from tinyllava_fast.data.pictures import UPRIGHT, open_bytes, to_rgb
from tinyllava_fast.errors import DataError

ROW = np.dtype(
    [("content", "<u8"), ("seen", "<u8"), ("mean", "u1", 3), ("width", "<i4"), ("height", "<i4"), ("bytes", "<i8")]
)
"""Of an image: digest of its bytes, perceptual hash, mean colour, size in pixels (0: it cannot be read), bytes."""
NEAR = 3
_COLOUR = 12  # levels that mean colours of near copies may be apart
_MARGIN = 2  # levels of grey that are no difference: noise of JPEG in a plain area
_BANDS = 4  # one of them is equal where at most 3 bits differ


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
            small = to_rgb(image, UPRIGHT).resize((9, 8), Image.Resampling.BOX, reducing_gap=2.0)
    except (DataError, OSError, ValueError):
        return row
    except Exception:  # decoders of damaged files raise SyntaxError, struct.error, zlib.error, ...
        return row
    row["width"], row["height"] = width, height
    pixels = np.asarray(small, np.int32)
    grey = pixels @ np.array([299, 587, 114]) // 1000
    row["seen"] = np.packbits(grey[:, 1:] - grey[:, :-1] > _MARGIN).view("<u8")[0]
    row["mean"] = pixels.reshape(-1, 3).mean(0).round()
    return row


def digest(content: bytes) -> int:
    """Return 64 bits that tell contents apart."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def near_groups(rows: np.ndarray) -> np.ndarray:
    """Return the number of the group of near copies of each image: [n] int64, that of its first member.

    rows: [n] of ROW, images that can be read. All pairs within NEAR bits and alike in colour are in one group.
    """
    keys = np.stack([rows["seen"], _colours(rows)], 1)
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    chosen = rows[first]
    groups = np.arange(len(chosen))

    def top(number: int) -> int:
        while (above := groups[number]) != number:
            groups[number] = groups[above]
            number = above
        return number

    for one, other in _pairs(chosen["seen"], chosen["mean"].astype(np.int16)):
        low, high = sorted((top(one), top(other)), key=lambda number: first[number])
        groups[high] = low
    tops = np.array([top(number) for number in range(len(chosen))], np.int64)
    return first[tops][inverse.reshape(-1)] if len(rows) else np.zeros(0, np.int64)


def _colours(rows: np.ndarray) -> np.ndarray:
    red, green, blue = (rows["mean"][:, n].astype(np.uint64) for n in range(3))
    return red << np.uint64(16) | green << np.uint64(8) | blue


def _pairs(seen: np.ndarray, mean: np.ndarray) -> Iterable[tuple[int, int]]:
    """Yield all pairs of images that look alike, some of them more than once."""
    for band in range(_BANDS):
        part = (seen >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.argsort(part, kind="stable")
        part = part[order]
        alive, apart = np.arange(len(part)), 0
        while True:
            apart += 1
            alive = alive[: np.searchsorted(alive, len(part) - apart)]
            alive = alive[part[alive] == part[alive + apart]]
            if not len(alive):
                break
            left, right = order[alive], order[alive + apart]
            alike = (_bits(seen[left] ^ seen[right]) <= NEAR) & (np.abs(mean[left] - mean[right]).max(1) <= _COLOUR)
            yield from zip(left[alike].tolist(), right[alike].tolist(), strict=True)


def _bits(values: np.ndarray) -> np.ndarray:
    """Return how many bits of each are set."""
    return np.unpackbits(np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8), axis=1).sum(1)


def rows_of(found: Sequence[np.ndarray]) -> np.ndarray:
    """Return parts of rows as one array."""
    return np.concatenate([np.zeros(0, ROW), *found])
