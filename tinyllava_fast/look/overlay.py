"""Maps over their pictures as images, for papers and thumbnails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tinyllava_fast.errors import writing
from tinyllava_fast.look.types import DEFAULT, METHODS, Look, Map

SIDE = 768
"""Pixels of an overlay's longer side, unless the picture's is longer."""
_COLOURS = np.array([[60, 20, 120], [180, 40, 120], [240, 120, 40], [255, 230, 90]], float)


def overlay(picture: Image.Image, found: Map, *, side: int = SIDE) -> Image.Image:
    """Return a picture, its longer side at least ``side`` pixels long, under its map: warmer is more."""
    scale = max(1.0, side / max(picture.size))
    width, height = (max(1, round(n * scale)) for n in picture.size)
    grown = picture.resize((width, height), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
    dense = found.raster(width, height)
    share = dense / max(float(dense.max()), 1e-30)
    at = np.minimum(share, 0.999) * 3
    low = at.astype(int)
    colour = _COLOURS[low] + (at - low)[..., None] * (_COLOURS[low + 1] - _COLOURS[low])
    alpha = np.minimum(1, 1.6 * share)[..., None] * 0.88
    mixed = np.asarray(grown) * (1 - alpha) + colour * alpha
    return Image.fromarray(mixed.round().astype(np.uint8))


def write_pngs(look: Look, folder: Path) -> list[Path]:
    """Write the answer's maps of every kind and each token's default map as PNGs; returns their paths.

    UserError if they cannot be written.
    """
    found = []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        maps = {f"answer_{name}": look.maps(name) for name in METHODS}
        maps |= {f"token_{n:03}_{DEFAULT}": look.maps(DEFAULT, n) for n in range(len(look.tokens))}
        for name, some in maps.items():
            for number, (picture, one) in enumerate(zip(look.pictures, some, strict=True)):
                path = folder / (f"{name}.png" if len(some) == 1 else f"{name}_picture{number}.png")
                overlay(picture, one).save(path, optimize=True)
                found.append(path)
    return found
