"""Random changes of training images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tinyllava_fast.config.ranges import Range, Share, ShareBelowOne


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of a training image, seeded by (seed, epoch, record, image). All zero: none."""

    hflip: Share = 0.0
    """Probability of a horizontal flip."""
    vflip: Share = 0.0
    """Probability of a vertical flip."""
    shift: Share = 0.0
    """Largest shift as a fraction of the side; uncovered pixels take the border colour."""
    keep_inside: bool = False
    """Shift and scale only as far as everything that differs from the border colour stays inside the image."""
    scale: ShareBelowOne = 0.0
    """Largest relative change of size: 0.2 draws from [0.8, 1.2]."""
    rotate: Annotated[float, Range(least=0, most=180)] = 0.0
    """Largest rotation in degrees."""
