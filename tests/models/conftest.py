"""Tiny seeded models and a ragged set of samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.tiny import IMAGE, LLAMA
from tinyllava_fast.config.schema import ConnectorConfig, LLMConfig, ModelConfig, VisionConfig
from tinyllava_fast.data.collate import collate, width
from tinyllava_fast.data.templates.base import Segment
from tinyllava_fast.data.types import IMAGE_INDEX, PackedBatch

TIED = LLAMA | {"vocab_size": 61, "tie_word_embeddings": True}
SIGLIP = IMAGE | {"num_hidden_layers": 3}


@dataclasses.dataclass
class Sequence:
    """One training sample before packing: ids with ``None`` where the image goes, and which answers count."""

    ids: list[int | None]
    supervised: list[bool]
    pixels: Tensor | None


@pytest.fixture
def tiny() -> Callable[..., ModelConfig]:
    """A small ModelConfig; keyword arguments change the transformers configs."""

    def make(
        llm: dict[str, object] | None = None,
        vision: dict[str, object] | None = None,
        tower: str = "siglip",
        **more: object,
    ) -> ModelConfig:
        return ModelConfig(
            llm=LLMConfig(config={**TIED, **(llm or {})}),
            vision=VisionConfig(type=tower, config={**SIGLIP, **(vision or {})}, **more),
            connector=ConnectorConfig(),
        )

    return make


@pytest.fixture
def ragged() -> Callable[..., list[Sequence]]:
    """Samples of different lengths; every third one has no image."""

    def make(count: int, *, seed: int = 0, vocab: int = 61, size: int = 16) -> list[Sequence]:
        rng = torch.Generator().manual_seed(seed)
        samples = []
        for i in range(count):
            length = int(torch.randint(4, 12, (), generator=rng))
            ids: list[int | None] = torch.randint(3, vocab, (length,), generator=rng).tolist()
            mask = (torch.rand(length, generator=rng) < 0.4).tolist()
            mask[-1] = True
            image = None
            if i % 3:
                ids.insert(1, None)
                mask.insert(1, False)
                image = torch.randn(3, size, size, generator=rng)
            samples.append(Sequence(ids, mask, image))
        return samples

    return make


@pytest.fixture
def pack() -> Callable[..., PackedBatch]:
    """Return a function that lays samples end to end; ``spare`` positions and segments stay unused."""

    def make(samples: list[Sequence], tokens_per_image: int, *, spare: int = 3, size: int = 16) -> PackedBatch:
        segments = []
        for sample in samples:
            ids = [IMAGE_INDEX if token is None else token for token in sample.ids]
            segments.append(Segment(ids, [(i, i + 1) for i, counts in enumerate(sample.supervised) if counts]))
        images = [s.pixels for s in samples if s.pixels is not None]
        return collate(
            [[segment] for segment in segments],
            torch.stack(images) if images else torch.zeros(0, 3, size, size),
            tokens=width(segments, tokens_per_image) + spare,
            max_segments=len(samples) + spare,
            tokens_per_image=tokens_per_image,
        )

    return make
