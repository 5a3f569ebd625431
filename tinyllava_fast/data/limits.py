"""The most that one sample may take of a pack, and the messages for one that takes more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tinyllava_fast.config.schema import BatchConfig, DataConfig
from tinyllava_fast.data.collate import truncate, widen, width
from tinyllava_fast.data.templates.base import Segment
from tinyllava_fast.data.types import IMAGE_INDEX


@dataclass(frozen=True)
class PackLimits:
    """The most that a sample may need. tokens: positions. key: that says so. tokens_per_image: of a tower input."""

    tokens: int
    key: str
    images: int
    segments: int
    tokens_per_image: int
    overlong: Literal["fail", "truncate"]

    @classmethod
    def of(cls, data: DataConfig, batch: BatchConfig, tokens_per_image: int) -> PackLimits:
        """Return the limits of a stage's data."""
        tokens = min(data.max_tokens or batch.tokens, batch.tokens)
        key = "batch.tokens" if tokens == batch.tokens else "data.max_tokens"
        return cls(tokens, key, batch.max_images, batch.max_segments, tokens_per_image, data.overlong)

    def too_long(self, length: int, largest: int) -> str:
        """Return why a sample longer than ``tokens`` may not be cut, its field first; "" if it may.

        largest: tower inputs of its largest image.
        """
        rows = self.tokens_per_image * largest
        if rows >= self.tokens:
            return f"image: {rows} image tokens do not fit {self.key}={self.tokens}; raise {self.key}"
        if self.overlong == "fail":
            remedy = f"raise {self.key}, or set data.overlong=truncate"
            return f"conversations: {length} tokens exceed {self.key}={self.tokens}; {remedy}"
        return ""

    def too_many(self, images: int, segments: int) -> str:
        """Return what there is too much of for a pack, its field first; "" for nothing."""
        if images > self.images:
            return f"conversations: {images} images exceed batch.max_images={self.images}; raise it"
        if segments > self.segments:
            return f"conversations: {segments} segments exceed batch.max_segments={self.segments}; raise it"
        return ""

    def problem(self, sample: Sequence[Segment], inputs: Sequence[int]) -> str:
        """Return why no pack can hold a sample, "" if one can. inputs: of the tower, for the image at each marker."""
        length = width(widen(sample, inputs), self.tokens_per_image)
        if length > self.tokens:
            if said := self.too_long(length, max(inputs, default=0)):
                return said
            sample = truncate(sample, self.tokens, self.tokens_per_image, inputs)
        shown = sum(segment.ids.count(IMAGE_INDEX) for segment in sample)
        return self.too_many(sum(inputs[:shown]), len(sample))
