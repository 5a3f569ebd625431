"""A small model and a batch that reaches every component. Widths are multiples of 64, as nf4 on a CPU needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tinyllava_fast.config.schema import LLMConfig, ModelConfig, VisionConfig
from tinyllava_fast.models.build import build_model
from tinyllava_fast.models.lmm import LMM

LLAMA = tiny.LLAMA | {
    "hidden_size": 64,
    "intermediate_size": 64,
    "vocab_size": 61,
    "attention_bias": True,
    "tie_word_embeddings": False,
}
SIGLIP = tiny.IMAGE | {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 64}


@pytest.fixture
def make_lmm() -> Callable[..., LMM]:
    """The model; keyword arguments change the language model's config."""

    def make(seed: int = 0, **llm: Any) -> LMM:
        model = ModelConfig(llm=LLMConfig(config={**LLAMA, **llm}), vision=VisionConfig(config=SIGLIP))
        return build_model(model, seed=seed)

    return make


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Two segments, one with an image, a spare tail."""
    rng = torch.Generator().manual_seed(1)
    total = 20
    labels = torch.full((total,), -100)
    labels[6:9] = labels[11:14] = torch.tensor([5, 6, 7])
    return {
        "input_ids": torch.randint(3, 61, (total,), generator=rng),
        "labels": labels,
        "position_ids": torch.cat([torch.arange(10), torch.arange(6), torch.arange(4)]),
        "cu_seqlens": torch.tensor([0, 10, 16, 16], dtype=torch.int32),
        "prefix": torch.zeros(3, 2, dtype=torch.int32),
        "image_slots": torch.arange(1, 5),
        "supervised": torch.tensor([6, 7, 8, 11, 12, 13] + [total] * 14),
        "pixel_values": torch.randn(1, 3, 16, 16, generator=rng),
    }


@pytest.fixture
def train_steps(batch: dict[str, Tensor]) -> Callable[..., list[float]]:
    """AdamW steps on the batch; returns the losses."""

    def run(lmm: LMM, groups: list[Any], steps: int = 1) -> list[float]:
        optimizer, losses = torch.optim.AdamW(groups), []
        for _ in range(steps):
            loss = lmm(**batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    return run
