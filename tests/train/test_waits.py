"""A step of training holds no operator that makes the host wait for the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.waits import Operators, ops_are_opaque
from tinyllava_fast.config.load import load_run
from tinyllava_fast.config.schema import OptimConfig
from tinyllava_fast.data.dataset import PackedDataset
from tinyllava_fast.models.build import build_image_processor, build_model, build_tokenizer
from tinyllava_fast.recipes.base import apply_recipe
from tinyllava_fast.train.engine.base import total
from tinyllava_fast.train.engine.torch_engine import TorchEngine
from tinyllava_fast.train.optim import lower

__all__ = ["ops_are_opaque"]
RECIPES = {"full": "{vision: {tune: full}}", "lora": "{llm: {tune: lora}}"}


@pytest.mark.usefixtures("ops_are_opaque")
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_waits_for_nothing(tiny_run: Any, name: str) -> None:
    """Two micro-batches and the update, guarded against norms that are no numbers, in bfloat16 with masters."""
    changes = [f"stages.finetune.recipe={RECIPES[name]}", "model.llm.config.tie_word_embeddings=false"]
    run = load_run(tiny_run(), changes)
    model, stage = build_model(run.model, seed=0), run.stages[1]
    data = PackedDataset(
        stage.data,
        stage.batch,
        tokenizer=build_tokenizer(run.model),
        processor=build_image_processor(run.model),
        tokens_per_image=model.tokens_per_image,
        seed=0,
    )
    packs = [data.pack(0, tickets) for tickets in data.plan(0)[:2]]
    assert all(len(pack.pixel_values) for pack in packs)
    groups = apply_recipe(model, stage.recipe, stage.optim)
    names = {p: n for n, p in model.named_parameters()}
    named = [{**group, "params": [names[p] for p in group["params"]]} for group in groups]
    lower(model, torch.bfloat16)
    model = model.to("meta")
    own = dict(model.named_parameters())
    optim = OptimConfig(betas=(0.9, 0.99), eps=1e-8, clip_norm=1.0)
    groups = [{**group, "params": [own[n] for n in group["params"]]} for group in named]
    engine = TorchEngine(model, groups, optim, device=torch.device("meta"))
    rates = {group["name"]: 1e-3 for group in groups}
    for step in range(2):  # the first one makes the optimizer's state
        with Operators("meta") as operators:
            losses = torch.stack([total(engine.forward_backward(pack, 0.01)) for pack in packs])
            norm = engine.step(rates, losses.sum())
        assert norm.is_meta and not operators.waiting, step
    for op in ("linear_cross_entropy_fwd", "packed_attention_bwd", "adamw"):
        assert any(op in called for called in operators.called)
