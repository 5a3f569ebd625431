"""The one currency between data and model.

Legend: T token budget, S max segments, N images in the pack, K tokens an image, M = T supervised slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
IMAGE_TOKEN = "<image>"
IMAGE_INDEX = -200  # stands for one image in a list of ids, before it is widened to K positions


class ImagePart(Enum):
    """The part of a message that is not text."""

    IMAGE = IMAGE_TOKEN
    """Stands for the next image."""

    def __repr__(self) -> str:
        return self.name


@dataclass
class PackedBatch:
    """Several samples in one row of T tokens. Attention stays inside a segment (and its shared prefix).

    Segments are laid end to end from position 0. Tokens at and beyond ``cu_seqlens[-1]`` are the unused tail: input id
    0, label -100, attended by nothing. All tensors but the pixels have shapes fixed for a run, so graphs are static.

    A segment may have a *shared prefix*: ``prefix[s] = (start, length)`` names tokens of this pack (the system text and
    image of a record whose turns are trained independently) that every token of segment s sees besides its own
    segment. (0, 0) means none.
    """

    input_ids: Tensor  # [T] int64; image positions hold 0 and are never embedded
    labels: Tensor  # [T] int64; -100 = unsupervised; already shifted by one inside each segment
    position_ids: Tensor  # [T] int64; restart at 0 in each segment, or at the prefix's length
    cu_seqlens: Tensor  # [S + 1] int32; segment bounds, padded by repeating the last bound
    image_slots: Tensor  # [N * K] int64; position in T of each image token; T (one past the end) = nowhere
    supervised: Tensor  # [M] int64; positions with labels != -100, ascending, padded with T
    pixel_values: Tensor  # [N, 3, H, W] float32, already normalized; N may be 0. Or [N, K', V]: the features of a
    # frozen tower, if they are cached (train/features.py)
    prefix: Tensor | None = None  # [S, 2] int32; (start, length) of the shared prefix of each segment, (0, 0) = none;
    # None where no segment of the run can have one, which is the same for all packs of a stage
    num_supervised: int = 0
    num_tokens: int = 0  # T minus the unused tail
    num_samples: int = 0
    sample_ids: list[str] = field(default_factory=list)
    skipped: list[str] = field(
        default_factory=list
    )  # records dropped from this pack (data.on_bad_image: skip), with reasons

    def tensors(self) -> dict[str, Tensor]:
        """The keyword arguments of LMM.forward."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def to(self, device: torch.device | str) -> PackedBatch:
        """A copy on the device; copies are asynchronous where the source is pinned."""
        moved: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in self.tensors().items()}
        return replace(self, **moved)

    def pin_memory(self) -> PackedBatch:
        """A copy in pinned host memory; called by DataLoader(pin_memory=True)."""
        pinned: dict[str, Any] = {k: v.pin_memory() for k, v in self.tensors().items()}
        return replace(self, **pinned)
