"""The rate of every parameter by its name: layer-wise decay, LoRA+, both, with rates of components of their own."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.recipes.test_base import FULL, LLAMA, SIGLIP
from tinyllava_fast.config.load import load_run
from tinyllava_fast.config.schema import (
    ConnectorConfig,
    LLMConfig,
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    RecipeConfig,
    TuneConfig,
    VisionConfig,
)
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.build import build_model
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.models.vision.base import VISION
from tinyllava_fast.recipes.base import apply_recipe, check_recipe, find_recipe
from tinyllava_fast.train.metrics import shown_rates
from tinyllava_fast.train.optim import MasterOptimizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lmm() -> LMM:
    return build_model(ModelConfig(llm=LLMConfig(config=LLAMA), vision=VisionConfig(config=SIGLIP)), seed=0)


def rates(lmm: LMM, recipe: RecipeConfig, lr: float = 1.0) -> dict[str, float]:
    """Rate of each weight that trains."""
    groups = apply_recipe(lmm, recipe, OptimConfig(lr=lr))
    names = {p: name for name, p in lmm.named_parameters()}
    found = {names[p]: group["lr"] for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in names)
    return found


def depth_of(name: str, layers: int) -> int:
    """Depth of a weight of the tiny models by its name."""
    layer = re.search(r"layers\.(\d+)\.", name)
    if layer:
        return int(layer.group(1)) + 1
    return 0 if "embed" in name else layers + 1


def test_the_rate_falls_from_layer_to_layer(lmm: LMM) -> None:
    recipe = RecipeConfig(
        llm=TuneConfig(layer_decay=0.5), vision=TuneConfig(layer_decay=0.9, lr=1e-2), connector=TuneConfig(lr=3.0)
    )
    found = rates(lmm, recipe)
    built = len(lmm.vision.layers)
    for name, rate in found.items():
        if name.startswith("llm."):
            assert rate == 0.5 ** (4 - depth_of(name, 3)), name
        elif name.startswith("vision."):
            assert rate == 1e-2 * 0.9 ** (built + 1 - depth_of(name, built)), name
        else:
            assert rate == 3.0
    assert found["llm.model.embed_tokens.weight"] == 0.5**4 and found["llm.model.norm.weight"] == 1.0
    assert found["llm.model.layers.2.mlp.up_proj.weight"] == 0.5
    assert {rate for name, rate in found.items() if "vision.embeddings" in name} == {1e-2 * 0.9 ** (built + 1)}


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_b_has_a_multiple_of_the_rate_of_a(lmm: LMM, decay: float) -> None:
    adapted = TuneConfig(tune="lora", lr=2e-4, layer_decay=decay, lora=LoRAConfig(r=2, b_lr_ratio=16))
    found = rates(lmm, RecipeConfig(llm=adapted, connector=FULL), lr=1e-3)
    assert any("lora_B" in name for name in found)
    for name, rate in found.items():
        ratio = 16 if "lora_B" in name else 1
        expected = 1e-3 if name.startswith("connector") else 2e-4 * decay ** (4 - depth_of(name, 3)) * ratio
        assert rate == pytest.approx(expected, rel=1e-12), name


def test_each_half_of_a_mixture_of_towers_has_its_own_depth() -> None:
    tiny = VISION.get("mof").tiny()
    vision = VisionConfig(type="mof", config=tiny["config"], options=tiny["options"], feature_layer=-1)
    model = ModelConfig(llm=LLMConfig(config=LLAMA), vision=vision, connector=ConnectorConfig(type="mof_mlp"))
    lmm = build_model(model, seed=0)
    found = rates(lmm, RecipeConfig(vision=TuneConfig(layer_decay=0.5)))
    for half in ("clip", "dinov2"):
        own = {name: rate for name, rate in found.items() if name.startswith(f"vision.{half}.")}
        layers = max(int(m.group(1)) for name in own if (m := re.search(r"layers?\.(\d+)\.", name))) + 1
        assert {rate for name, rate in own.items() if re.search(rf"layers?\.{layers - 1}\.", name)} == {0.5}
        assert min(own.values()) == 0.5 ** (layers + 1) and max(own.values()) in (0.5, 1.0)


def test_the_papers_recipes_keep_the_rates_of_their_parts(lmm: LMM) -> None:
    """That of LoRA trains the connector at another rate than the adapters."""
    path = ROOT / "configs" / "paper" / "lora" / "qwen2_0_5b_siglip.yaml"
    plain = load_run(path).stages[-1]
    keys = [f"stages.{plain.name}.recipe.llm.{key}" for key in ("layer_decay=0.9", "lora.b_lr_ratio=4")]
    stage = load_run(path, keys).stages[-1]
    groups = apply_recipe(lmm, stage.recipe, stage.optim)
    names = {p: name for name, p in lmm.named_parameters()}
    peak = {part: getattr(plain.recipe, part).lr or plain.optim.lr for part in ("llm", "connector", "vision")}
    for group in groups:
        for name in (names[p] for p in group["params"]):
            ratio = 4 if "lora_B" in name else 1
            decay = 0.9 ** (4 - depth_of(name, 3)) if name.startswith("llm") else 1.0
            assert group["lr"] == pytest.approx(peak[name.partition(".")[0]] * decay * ratio, rel=1e-12), name
    shown = shown_rates({group["name"]: group["lr"] for group in groups})
    assert set(shown) == {group["name"].partition(".")[0] for group in groups} | {"llm.lora_b"}
    assert shown["llm.lora_b"] == pytest.approx(4 * shown["llm"])


def test_muon_steps_at_the_rates_of_the_groups(lmm: LMM) -> None:
    recipe = RecipeConfig(llm=TuneConfig(layer_decay=0.5), connector=TuneConfig(tune="frozen"))
    groups = apply_recipe(lmm, recipe, OptimConfig(lr=1e-2))
    names = {p: name for name, p in lmm.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for p, name in names.items()}
    optimizer = MasterOptimizer(groups, names, OptimConfig(type="muon", clip_norm=0))
    same = torch.randn(next(p for p, n in names.items() if n.endswith("layers.0.mlp.up_proj.weight")).shape)
    for p in names:
        p.grad = same.clone() if p.shape == same.shape else torch.ones_like(p)
    optimizer.step({group["name"]: group["lr"] for group in groups})
    moved = {name: float((p.detach() - before[name]).norm()) for p, name in names.items()}
    first, last = (moved[f"llm.model.layers.{i}.mlp.up_proj.weight"] for i in (0, 2))
    assert last == pytest.approx(4 * first, rel=1e-4) and first > 0
    norm, below = moved["llm.model.norm.weight"], moved["llm.model.layers.2.input_layernorm.weight"]
    assert norm == pytest.approx(2 * below, rel=1e-4) and below > 0


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (RecipeConfig(connector=TuneConfig(layer_decay=0.9)), r"connector\.layer_decay: a connector has no layers"),
        (RecipeConfig(vision=TuneConfig(tune="frozen", layer_decay=0.9)), r"vision\.layer_decay: set, but .*'frozen'"),
        (RecipeConfig(llm=TuneConfig(lora=LoRAConfig(b_lr_ratio=2))), r"recipe\.llm\.lora: set, but .*'full'"),
    ],
    ids=["connector", "frozen", "no adapter"],
)
def test_rates_that_would_be_ignored_are_refused(recipe: RecipeConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_recipe(recipe)


def test_a_tower_that_names_no_layers(lmm: LMM, monkeypatch: Any) -> None:
    monkeypatch.setattr(type(lmm.vision), "layers", property(lambda _: nn.ModuleList()))
    recipe = replace(RecipeConfig(), vision=TuneConfig(layer_decay=0.9))
    with pytest.raises(UserError, match=r"recipe\.vision\.layer_decay: this vision tower names no layers"):
        check_recipe(lmm, recipe)
