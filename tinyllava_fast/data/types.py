"""The one currency between data and model.

Legend: T token budget, S max segments, N images in the pack, K tokens an image, M = T supervised slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from tinyllava_fast.data.images import normalized

IGNORE_INDEX = -100
IMAGE_TOKEN = "<image>"
IMAGE_INDEX = -200  # stands for one image in a list of ids, before it is widened to K positions


class ImagePart(Enum):
    """The part of a message that is not text."""

    IMAGE = IMAGE_TOKEN
    """Stands for the next image."""

    def __repr__(self) -> str:
        return self.name


def laid_out(parts: Sequence[str | ImagePart]) -> list[str | ImagePart]:
    """Return the parts of a message one line each, images before the text, as models are trained.

    Where images stand between texts the order tells which is which, and stays.
    """
    if sum(isinstance(part, str) for part in parts) <= 1:
        parts = sorted(parts, key=lambda part: isinstance(part, str))
    found: list[str | ImagePart] = []
    for part in parts:
        found += ["\n"] * bool(found) + [part]
    return found


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
    supervised: Tensor  # [M] int64; positions with labels != -100, ascending, padded with T; M <= T after ``to`` a GPU
    pixel_values: Tensor  # [N, 3, H, W] float32, already normalized; N may be 0. Or uint8, a quarter of the bytes, on
    # the way to where ``to`` normalizes them. Or [N, K', V]: features of a frozen tower that are cached
    prefix: Tensor | None = None  # [S, 2] int32; (start, length) of the shared prefix of each segment, (0, 0) = none;
    # None where no segment of the run can have one, which is the same for all packs of a stage
    levels: Tensor | None = None  # [3, 256] float32; of pixel values in uint8, the normalized value of each
    num_blank: int = 0  # images at the end that fill no slot: in float32 they are zero
    num_supervised: int = 0
    num_tokens: int = 0  # T minus the unused tail
    num_samples: int = 0
    sample_ids: list[str] = field(default_factory=list)
    sample_sources: list[int] = field(default_factory=list)  # number of each sample's source; empty if there is one
    segment_sources: list[int] = field(default_factory=list)  # number of each segment's source; empty if there is one
    source_counts: list[tuple[int, int, int]] = field(
        default_factory=list
    )  # (samples, tokens, supervised tokens) of each source; empty likewise
    skipped: list[str] = field(
        default_factory=list
    )  # records dropped from this pack (data.on_bad_image: skip), with reasons

    def tensors(self) -> dict[str, Tensor]:
        """Return the keyword arguments of LMM.forward."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return a copy on the device, normalized; copies are asynchronous where the source is pinned."""
        is_host = torch.device(device).type == "cpu"
        trimmed = self if is_host or not self.supervised.is_cpu else replace(self, supervised=self._slots())
        moved = trimmed._moved(lambda tensor: tensor.to(device, non_blocking=True))
        if moved.levels is None:
            return moved
        pixels = normalized(moved.pixel_values, moved.levels)
        pixels[len(pixels) - moved.num_blank :] = 0.0
        return replace(moved, pixel_values=pixels, levels=None)

    def _slots(self) -> Tensor:
        """Return the first slots of ``supervised``, in eighths of T, as many as hold all that are used.

        On a GPU the head multiplies every slot: to look which are used would stop the host in the middle of a step.
        """
        tokens = len(self.input_ids)
        used, part = int((self.supervised < tokens).sum()), max(1, -(-tokens // 8))
        return self.supervised[: max(part, -(-used // part) * part)]

    def pin_memory(self) -> PackedBatch:
        """Return a copy in pinned host memory; called by DataLoader(pin_memory=True)."""
        return self._moved(lambda tensor: tensor.pin_memory())

    def _moved(self, move: Callable[[Tensor], Tensor]) -> PackedBatch:
        moved: dict[str, Any] = {name: move(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **moved)
