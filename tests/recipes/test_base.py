"""Recipes: exactly the parameters that a recipe names move, each in exactly one group."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.examples import write_example
from tinyllava_fast.config.schema import LLMConfig, ModelConfig, OptimConfig, RecipeConfig, TuneConfig, VisionConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.build import build_model
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.plugins import load_plugins
from tinyllava_fast.recipes.base import RECIPES, apply_recipe

LLAMA = tiny.LLAMA | {
    "num_hidden_layers": 3,
    "vocab_size": 61,
    "attention_bias": True,
    "tie_word_embeddings": True,
}
SIGLIP = tiny.IMAGE | {"num_hidden_layers": 3}
FROZEN, FULL = TuneConfig(tune="frozen"), TuneConfig(tune="full")


@pytest.fixture
def lmm() -> LMM:
    return build_model(ModelConfig(llm=LLMConfig(config=LLAMA), vision=VisionConfig(config=SIGLIP)), seed=0)


def partial(from_layer: int) -> TuneConfig:
    return TuneConfig(tune="partial", from_layer=from_layer)


def one_step(lmm: LMM, groups: list[Any]) -> None:
    """Forward, backward and an AdamW step on two segments, one with an image."""
    rng = torch.Generator().manual_seed(1)
    total = 16
    labels = torch.full((total,), -100)
    labels[6:9] = labels[11:14] = torch.tensor([5, 6, 7])
    loss = lmm(
        input_ids=torch.randint(3, 61, (total,), generator=rng),
        labels=labels,
        position_ids=torch.cat([torch.arange(10), torch.arange(6)]),
        cu_seqlens=torch.tensor([0, 10, 16], dtype=torch.int32),
        prefix=torch.zeros(2, 2, dtype=torch.int32),
        image_slots=torch.arange(1, 5),
        supervised=torch.tensor([6, 7, 8, 11, 12, 13] + [total] * 10),
        pixel_values=torch.randn(1, 3, 16, 16, generator=rng),
    )
    loss.backward()
    torch.optim.AdamW(groups).step()


@pytest.mark.parametrize(
    ("recipe", "moves"),
    [
        (RecipeConfig(llm=FROZEN, vision=FROZEN, connector=FULL), ("connector.",)),
        (RecipeConfig(), ("connector.", "llm.")),
        (RecipeConfig(llm=FROZEN, vision=FULL, connector=FROZEN), ("vision.",)),
        (RecipeConfig(llm=FULL, vision=FULL, connector=FULL), ("connector.", "llm.", "vision.")),
        (RecipeConfig(llm=partial(1), connector=FROZEN), ("llm.model.layers.1.", "llm.model.layers.2.")),
        (RecipeConfig(llm=FROZEN, vision=partial(1), connector=FROZEN), ("vision.encoder.layers.1.",)),
    ],
)
def test_exactly_these_parameters_move(recipe: RecipeConfig, moves: tuple[str, ...], lmm: LMM) -> None:
    before = {n: p.detach().clone() for n, p in lmm.named_parameters()}
    groups = apply_recipe(lmm, recipe, OptimConfig(lr=1e-2, weight_decay=0.1))
    one_step(lmm, groups)
    moved = {n for n, p in lmm.named_parameters() if not torch.equal(p, before[n])}
    # A key's bias adds the same number to every score of a query: its gradient is rounding noise or zero.
    expected = {n for n in before if n.startswith(moves) and not n.endswith("k_proj.bias")}
    assert {n for n in moved if not n.endswith("k_proj.bias")} == expected and expected
    assert all(n.startswith(moves) for n in moved)
    listed = [id(p) for g in groups for p in g["params"]]
    assert len(listed) == len(set(listed)) == sum(p.requires_grad for p in lmm.parameters())


def test_groups_have_their_own_rate_and_decay_only_on_matrices(lmm: LMM) -> None:
    recipe = RecipeConfig(llm=TuneConfig(lr=1e-5), vision=FULL)
    groups = apply_recipe(lmm, recipe, OptimConfig(lr=1e-3, weight_decay=0.1))
    by_name = {g["name"]: g for g in groups}
    assert set(by_name) == {f"{c}{s}" for c in ("llm", "vision", "connector") for s in ("", ".no_decay")}
    for name, group in by_name.items():
        assert group["lr"] == (1e-5 if name.startswith("llm") else 1e-3)
        assert group["weight_decay"] == (0.0 if name.endswith("no_decay") else 0.1)
    undecayed = {id(p) for name, g in by_name.items() if name.endswith("no_decay") for p in g["params"]}
    for name, p in lmm.named_parameters():
        special = p.ndim == 1 or "embed_tokens" in name or "position_embedding" in name
        assert (id(p) in undecayed) == special, name
    assert "lm_head" not in dict(lmm.named_parameters()), "tied: the embedding is listed once"


def test_a_recipe_undoes_the_one_before(lmm: LMM) -> None:
    apply_recipe(lmm, RecipeConfig(llm=FROZEN), OptimConfig())
    assert not any(p.requires_grad for p in lmm.llm.parameters())
    apply_recipe(lmm, RecipeConfig(llm=FULL), OptimConfig())
    assert all(p.requires_grad for p in lmm.llm.parameters())


def test_counts_are_logged(lmm: LMM, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("tinyllava_fast")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.INFO, logger="tinyllava_fast"):
        apply_recipe(lmm, RecipeConfig(llm=FROZEN), OptimConfig())
    lines = {m.split()[0]: m.split()[1:] for m in caplog.messages}
    size = sum(p.numel() for p in lmm.connector.parameters())
    assert lines["connector"] == [f"{size:,}", f"{size:,}"]
    assert lines["llm"] == ["0", f"{sum(p.numel() for p in lmm.llm.parameters()):,}"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (RecipeConfig(type="bass"), r"recipe\.type: unknown recipe 'bass'; did you mean 'base'"),
        (RecipeConfig(options={"x": 1}), r"recipe\.options\.x: unknown key"),
        (RecipeConfig(llm=partial(3)), r"recipe\.llm\.from_layer: 3 .* the llm has 3 layers, use 0\.\.2"),
        (RecipeConfig(vision=partial(2)), r"recipe\.vision\.from_layer: 2 .* the vision has 2 layers"),
        (RecipeConfig(llm=partial(-1)), r"recipe\.llm\.from_layer: -1"),
        (RecipeConfig(connector=partial(0)), r"recipe\.connector\.tune: a connector has no layers"),
        (RecipeConfig(llm=FROZEN, connector=FROZEN), "every component is frozen"),
        (RecipeConfig(llm=TuneConfig(tune="half")), r"recipe\.llm\.tune: 'half'"),  # type: ignore[arg-type]
    ],
)
def test_errors(recipe: RecipeConfig, message: str, lmm: LMM) -> None:
    with pytest.raises(UserError, match=message):
        apply_recipe(lmm, recipe, OptimConfig())


def test_the_recipe_that_the_documentation_shows(lmm: LMM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RECIPES, "_entries", {name: RECIPES.get(name) for name in RECIPES})
    load_plugins([str(write_example(tmp_path, "biases.py"))])
    groups = apply_recipe(lmm, RecipeConfig(type="biases"), OptimConfig(weight_decay=0.1))
    trains = {name for name, p in lmm.named_parameters() if p.requires_grad}
    assert trains and all(name.endswith(".bias") for name in trains)
    assert all(group["weight_decay"] == 0 for group in groups)
