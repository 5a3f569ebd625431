"""Tiny seeded models and a ragged set of samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import IMAGE, LLAMA
from tinyllava_fast.config.schema import ConnectorConfig, LLMConfig, ModelConfig, VisionConfig
from tinyllava_fast.data.types import PackedBatch

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
        llm: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, tower: str = "siglip", **more: Any
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
    """Lay samples end to end, K positions an image; ``spare`` positions and segments stay unused."""

    def make(samples: list[Sequence], tokens_per_image: int, *, spare: int = 3, size: int = 16) -> PackedBatch:
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        bounds = [0]
        for sample in samples:
            row: list[int] = []
            target: list[int] = []
            for token, counts in zip(sample.ids, sample.supervised, strict=True):
                if token is None:
                    start = bounds[-1] + len(row)
                    slots += range(start, start + tokens_per_image)
                    row += [0] * tokens_per_image
                    target += [-100] * tokens_per_image
                else:
                    row.append(token)
                    target.append(token if counts else -100)
            ids += row
            labels += [*target[1:], -100]
            positions += range(len(row))
            bounds.append(len(ids))
        total = len(ids) + spare
        labels += [-100] * spare
        at = [i for i, label in enumerate(labels) if label != -100]
        images = [s.pixels for s in samples if s.pixels is not None]
        return PackedBatch(
            input_ids=torch.tensor(ids + [0] * spare),
            labels=torch.tensor(labels),
            position_ids=torch.tensor(positions + [0] * spare),
            cu_seqlens=torch.tensor(bounds + [bounds[-1]] * spare, dtype=torch.int32),
            prefix=torch.zeros(len(samples) + spare, 2, dtype=torch.int32),
            image_slots=torch.tensor(slots, dtype=torch.int64),
            supervised=torch.tensor(at + [total] * (total - len(at))),
            pixel_values=torch.stack(images) if images else torch.zeros(0, 3, size, size),
            num_supervised=len(at),
        )

    return make
