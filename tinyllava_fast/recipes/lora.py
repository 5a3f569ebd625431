"""LoRA (arXiv 2106.09685) through peft: the settings of a recipe's components as one peft adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from tinyllava_fast.config.schema import EngineConfig, LoRAConfig, RecipeConfig, TuneConfig
from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.log import log
from tinyllava_fast.models import adapter
from tinyllava_fast.models.adapter import Adapter, LayerSettings
from tinyllava_fast.models.lmm import COMPONENTS, LMM
from tinyllava_fast.recipes.linears import linears

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTED = ("lora", "qlora")
T = TypeVar("T")


@dataclass
class Plan:
    """The adapter that a recipe asks for. dropout: by component."""

    config: LoraConfig
    layers: dict[str, LayerSettings]
    dropout: dict[str, float]


def check_engine(recipe: RecipeConfig, engine: EngineConfig, where: str) -> None:
    """Raise UserError if the engine cannot train the adapters."""
    for component in COMPONENTS:
        tune: TuneConfig = getattr(recipe, component)
        if tune.tune not in ADAPTED or not tune.lora.dora:
            continue
        key = f"{where}.recipe.{component}.lora.dora"
        if engine.compile is not False:
            raise UserError(f"{key}: peft's DoRA does not trace into one graph; set engine.compile or dora to false")
        if engine.sharding == 3:
            raise UserError(
                f"{key}: peft's DoRA reads whole weights, which engine.type: fsdp and zero_stage: 3 shard; set type: "
                "ddp or zero_stage: 2, or dora: false"
            )


def plan(lmm: LMM, recipe: RecipeConfig) -> Plan | None:
    """Return the adapter that the recipe asks for, None if it has no lora or qlora. The model has no adapter now.

    Raises UserError naming the key for names that match nothing, values out of range, or what one adapter cannot hold.
    """
    tunes: dict[str, TuneConfig] = {name: getattr(recipe, name) for name in COMPONENTS}
    settings = {name: tune.lora for name, tune in tunes.items() if tune.tune in ADAPTED}
    if not settings:
        return None
    layers: dict[str, LayerSettings] = {}
    for component, lora in settings.items():
        _check(lora, f"recipe.{component}.lora")
        layers |= _layers(lmm, component, lora)
    first, main = next(iter(settings.items()))
    for component, lora in settings.items():
        for key in ("rslora", "dora"):
            if getattr(lora, key) != getattr(main, key):
                raise UserError(
                    f"recipe.{component}.lora.{key}: {getattr(lora, key)}, but recipe.{first}.lora.{key} is "
                    f"{getattr(main, key)}; peft has one such setting for an adapter, so let them agree"
                )
    config = adapter.import_peft().LoraConfig(
        r=main.r,
        lora_alpha=main.alpha,
        lora_dropout=main.dropout,
        target_modules=list(layers),
        rank_pattern={name: layer.r for name, layer in layers.items() if layer.r != main.r},
        alpha_pattern={name: layer.alpha for name, layer in layers.items() if layer.alpha != main.alpha},
        use_rslora=main.rslora,
        use_dora=main.dora,
    )
    return Plan(config, layers, {name: lora.dropout for name, lora in settings.items()})


def merge_unless_continued(lmm: LMM, held: Adapter | None, wanted: Plan | None) -> Adapter | None:
    """The adapter to go on with; one that does not fit the plan is merged into the weights instead, and None returned.

    held: the model's adapter so far, taken off it.
    """
    if held is None:
        return None
    if wanted is not None and held.layers == wanted.layers:
        log.info("LoRA: going on with the adapter of the model (%d layers)", len(held.layers))
        return held
    reason = "the recipe has no lora or qlora component" if wanted is None else _difference(held.layers, wanted.layers)
    log.info("LoRA: merging the adapter of the model (%d layers) into its weights: %s", len(held.layers), reason)
    adapter.attach(lmm, held, "the model's adapter")
    adapter.merge(lmm)
    return None


def _difference(held: Mapping[str, LayerSettings], wanted: Mapping[str, LayerSettings]) -> str:
    """Return a clause that says in what the adapter that the recipe asks for differs."""
    if held.keys() != wanted.keys():
        return f"the recipe adapts {len(wanted)} layers, {len(held.keys() & wanted.keys())} of them the same"
    name = next(name for name in wanted if held[name] != wanted[name])
    return f"the recipe asks for {wanted[name]._asdict()} at {name}, the adapter has {held[name]._asdict()}"


def inject(lmm: LMM, wanted: Plan, continued: Adapter | None, seed: int) -> None:
    """Put the planned adapter into the model, with the values of the one that it continues."""
    adapter.inject(lmm, wanted.config, seed=seed)
    adapter.set_dropout(lmm, wanted.dropout)
    if continued is not None:
        adapter.fill(lmm, continued.tensors, "the model's adapter")


def set_trainable(lmm: LMM, recipe: RecipeConfig) -> None:
    """Let adapters train, and the biases that ``lora.bias`` names. All else of these components is frozen."""
    for name, layer in adapter.layers(lmm):
        for parameter in adapter.parameters_of(layer):
            parameter.requires_grad_(True)
        if getattr(recipe, name.partition(".")[0]).lora.bias == "lora_only":
            bias = layer.get_base_layer().bias
            if bias is not None:
                bias.requires_grad_(True)
    for component in COMPONENTS:
        tune: TuneConfig = getattr(recipe, component)
        if tune.tune in ADAPTED and tune.lora.bias == "all":
            for name, parameter in getattr(lmm, component).named_parameters():
                if name.rpartition(".")[2].endswith("bias"):
                    parameter.requires_grad_(True)


def _check(lora: LoRAConfig, key: str) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        for entry in getattr(lora, field):
            try:
                re.compile(entry)
            except re.error as error:
                raise UserError(f"{key}.{field}: {entry!r} is no regular expression: {error}") from None


def _layers(lmm: LMM, component: str, lora: LoRAConfig) -> dict[str, LayerSettings]:
    """Return the settings of each layer that the component's LoRA adapts."""
    key = f"recipe.{component}.lora"
    names = [name for name, _ in linears(lmm, component)]
    if not names:
        raise UserError(f"recipe.{component}.tune: the {component} has no linear layer that LoRA could adapt")
    targets = names
    if lora.target_modules is not None:
        for end in lora.target_modules:
            if not any(_ends(name, end) for name in names):
                raise UserError(f"{key}.target_modules: {_why_not(lmm, component, end, names)}")
        targets = [name for name in names if any(_ends(name, end) for end in lora.target_modules)]
        if not targets:
            raise UserError(f"{key}.target_modules: empty; name a layer, or leave it out to adapt all of them")
    ranks = _match(lora.rank_pattern, targets, f"{key}.rank_pattern")
    alphas = _match(lora.alpha_pattern, targets, f"{key}.alpha_pattern")
    return {
        name: LayerSettings(ranks.get(name, lora.r), alphas.get(name, lora.alpha), lora.rslora, lora.dora)
        for name in targets
    }


def _match(pattern: Mapping[str, T], names: list[str], key: str) -> dict[str, T]:
    """Return the pattern's value for each name that it has one for, as peft matches them."""
    from peft.utils.other import get_pattern_key

    found = {name: entry for name in names if (entry := get_pattern_key(list(pattern), name)) in pattern}
    for entry in pattern:
        if entry not in found.values():
            raise UserError(f"{key}: {entry!r} matches no adapted layer; {nearest(entry, _leaves(names))}")
    return {name: pattern[entry] for name, entry in found.items()}


def _leaves(names: list[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _why_not(lmm: LMM, component: str, end: str, names: list[str]) -> str:
    for name, module in getattr(lmm, component).named_modules(prefix=component):
        if _ends(name, end):
            if isinstance(module, nn.Linear):
                return f"{end!r} is {name}, whose weight is read directly, past its adapter; leave it out"
            return f"{end!r} is {name}, a {type(module).__name__}; LoRA adapts linear layers only"
    return f"no linear layer of the {component} is called {end!r}; {nearest(end, _leaves(names))}"
