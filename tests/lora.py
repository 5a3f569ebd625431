"""Adapter folders for tiny models, and the models that they make when merged."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig

from tinyllava_fast.models import adapter
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.recipes.linears import linears


def write_adapter(
    lmm: LMM,
    folder: Path,
    *,
    seed: int,
    ends: Sequence[str] = (),
    component: str = "llm",
    size: float = 0.3,
    **config: object,
) -> LMM:
    """Write an adapter of a model's linear layers with these endings, all by default; return a merged copy.

    size: of the change, as a share of the weight's own.
    """
    adapted = copy.deepcopy(lmm)
    names = [n for n, _ in linears(adapted, component) if not ends or n.rpartition(".")[2] in ends]
    settings = {"r": 4, "lora_alpha": 8, **config}
    adapter.inject(adapted, LoraConfig(target_modules=names, **settings), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _, layer in adapter.layers(adapted):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        b.data = torch.randn(b.shape, generator=generator)
        change = layer.scaling["default"] * (b.data @ a.data)
        b.data *= size * layer.get_base_layer().weight.data.std() / change.std()
    _, tensors = adapter.split(adapted, adapted.state_dict())
    adapter.write(adapted, tensors, folder)
    adapter.merge(adapted)
    return adapted.eval()
