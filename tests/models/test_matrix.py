"""Language models x towers x connectors: every pair of components trains together, and is what it was once reloaded.

The whole product would be five hundred models; a covering set of a tenth of that holds every pair.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.models.llm.families import CONFIGS as LLM_CONFIGS
from tests.models.test_parts import CONNECTOR_OPTIONS, KINDS, TOWERS, tokenizer
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
from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.models import io
from tinyllava_fast.models.build import build_image_processor, build_model
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.recipes.base import apply_recipe
from tinyllava_fast.train.engine.torch_engine import TorchEngine

Triple = tuple[str, str, str]
FROZEN, FULL = TuneConfig(tune="frozen"), TuneConfig(tune="full")
LORA = TuneConfig(tune="lora", lora=LoRAConfig(r=4, alpha=8, dropout=0.0))
RECIPES = {
    "connector": RecipeConfig(llm=FROZEN, vision=FROZEN, connector=FULL),
    "llm and connector": RecipeConfig(llm=FULL, vision=FROZEN, connector=FULL),
    "everything": RecipeConfig(llm=FULL, vision=FULL, connector=FULL),
    "upper layers": RecipeConfig(
        llm=TuneConfig(tune="partial", from_layer=1),
        vision=TuneConfig(tune="partial", from_layer=1),
        connector=FULL,
    ),
    "lora": RecipeConfig(llm=LORA, vision=LORA, connector=FULL),
}


def fits(tower: str, connector: str) -> bool:
    """The connectors that join the features of two towers stand on no other one."""
    return tower == "mof" or not connector.startswith("mof")


def covering() -> list[Triple]:
    """Triples such that every two components that fit each other meet, chosen greedily."""
    triples = [t for t in itertools.product(LLM_CONFIGS, TOWERS, KINDS) if fits(*t[1:])]

    def pairs(triple: Triple) -> set[tuple[str, str]]:
        llm, tower, connector = (f"{kind}:{name}" for kind, name in zip("ltc", triple, strict=True))
        return {(llm, tower), (llm, connector), (tower, connector)}

    open_pairs = set().union(*map(pairs, triples))
    chosen = []
    while open_pairs:
        best = max(triples, key=lambda t: len(pairs(t) & open_pairs))
        chosen.append(best)
        open_pairs -= pairs(best)
    return chosen


TRIPLES = covering()


def build(llm: str, tower: str, connector: str) -> tuple[ModelConfig, LMM]:
    config = ModelConfig(
        llm=LLMConfig(type=llm, config=LLM_CONFIGS[llm]),
        vision=VisionConfig(type=tower, feature_layer=-1, **TOWERS[tower]),
        connector=ConnectorConfig(type=connector, options=CONNECTOR_OPTIONS[connector]),
    )
    return config, build_model(config, seed=1)


def due(lmm: LMM, recipe: RecipeConfig) -> set[str]:
    """Names of the weights that the recipe trains, worked out from the names alone."""
    wanted = set()
    layers = {id(p) for m in lmm.family.layers(lmm.llm)[1:] for p in m.parameters()}
    layers |= {id(p) for p in lmm.vision.layer_parameters(1)}
    for name, parameter in lmm.named_parameters():
        tune = getattr(recipe, name.partition(".")[0]).tune
        if tune == "full" or (tune == "partial" and id(parameter) in layers) or (tune == "lora" and "lora_" in name):
            wanted.add(name)
    return wanted


def two_steps(lmm: LMM, recipe: RecipeConfig, batch: PackedBatch) -> tuple[float, float]:
    """The loss before and after two optimizer steps on one batch."""
    optim = OptimConfig(lr=3e-3, betas=(0.9, 0.999), eps=1e-8, clip_norm=1.0)
    groups = apply_recipe(lmm, recipe, optim, seed=0)
    engine = TorchEngine(lmm, [dict(g) for g in groups], optim, device=torch.device("cpu"))
    lmm.eval()  # no dropout: the losses are of the same function
    losses = []
    for _ in range(3):
        losses.append(float(engine.forward_backward(batch, 1 / batch.num_supervised)))
        engine.step({g["name"]: g["lr"] for g in groups})
    return losses[0], losses[2]


def test_the_matrix_covers_every_pair() -> None:
    assert len(LLM_CONFIGS) >= 10 and len(KINDS) >= 7 and len(TOWERS) >= 5
    met = {frozenset(pair) for t in TRIPLES for pair in itertools.combinations(t, 2)}
    assert all(frozenset(p) in met for p in itertools.product(LLM_CONFIGS, TOWERS))
    assert all(frozenset(p) in met for p in itertools.product(LLM_CONFIGS, KINDS))
    assert all(frozenset(p) in met for p in itertools.product(TOWERS, KINDS) if fits(*p))
    assert len(TRIPLES) < 120


def recipe_of(number: int, connector: str) -> str:
    """The recipes take turns; an identity has nothing to train alone."""
    name = list(RECIPES)[number % len(RECIPES)]
    return "llm and connector" if (name, connector) == ("connector", "identity") else name


@pytest.mark.parametrize(
    ("triple", "recipe"),
    [(t, recipe_of(i, t[2])) for i, t in enumerate(TRIPLES)],
    ids=lambda v: "-".join(v) if isinstance(v, tuple) else v.replace(" ", "_"),
)
def test_two_steps_then_a_folder(triple: Triple, recipe: str, ragged: Callable, pack: Callable, tmp_path: Path) -> None:
    config, lmm = build(*triple)
    batch = dataclasses.replace(pack(ragged(6), lmm.tokens_per_image), prefix=None)  # windows know no shared prefixes
    apply_recipe(lmm, RECIPES[recipe], OptimConfig(), seed=0)  # adapters are part of what is compared
    before = {n: p.detach().clone() for n, p in lmm.named_parameters()}
    first, last = two_steps(lmm, RECIPES[recipe], batch)
    assert last < first
    after = dict(lmm.named_parameters())
    moved = {n for n, p in after.items() if n not in before or not torch.equal(p.detach(), before[n])}
    assert moved and moved == due(lmm, RECIPES[recipe])

    folder = io.save_model(lmm, tokenizer(), build_image_processor(config), tmp_path / "model")
    again = io.load_model(folder, merge_adapter=False)[0]
    assert torch.equal(again(**batch.tensors()), lmm(**batch.tensors()))
