"""The parts of a model that train in a stage, and their learning rates: layers, requires_grad and parameter groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypedDict, get_args

from torch import nn

from tinyllava_fast.config.load import parse_into
from tinyllava_fast.config.schema import EngineConfig, OptimConfig, RecipeConfig, Tune, TuneConfig
from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.log import log
from tinyllava_fast.models import adapter
from tinyllava_fast.models.lmm import COMPONENTS, LMM
from tinyllava_fast.recipes import lora, quantize
from tinyllava_fast.recipes.rates import Rate, layer_count, rates_of
from tinyllava_fast.registry import Registry


class ParameterGroup(TypedDict):
    """One group for the optimizer."""

    name: str  # "llm", "llm.no_decay", "llm.layer3.lora_b" (recipes/rates.py), ...
    params: list[nn.Parameter]
    lr: float
    weight_decay: float


class Recipe(ABC):
    """Decides which parameters of a model train."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Settings of this recipe alone."""

    def __init__(self, options: Any = None) -> None:
        self.options = options if options is not None else self.Options()

    def check_settings(self, recipe: RecipeConfig) -> None:
        """Raise UserError for a setting that is wrong whatever the model."""
        return

    def check(self, lmm: LMM, recipe: RecipeConfig) -> None:
        """Raise UserError for a setting that this model cannot satisfy, before an earlier stage trains for hours.

        The model has no adapter and is left as it is. ``apply`` raises likewise; a recipe that leaves this out is found
        wrong when its stage begins.
        """
        return

    @abstractmethod
    def apply(self, lmm: LMM, recipe: RecipeConfig, *, seed: int) -> None:
        """Set requires_grad of every parameter; layers may be wrapped or replaced. seed: of new weights."""


_ALL_FROZEN = "recipe: every component is frozen; set another tune for one of llm, vision, connector"
RECIPES: Registry[type[Recipe]] = Registry("recipe", "tinyllava_fast.recipes")


@RECIPES.register("base")
class BaseRecipe(Recipe):
    """Each component is frozen, full, trains its layers from ``from_layer`` on, or has LoRA layers (lora, qlora)."""

    def check_settings(self, recipe: RecipeConfig) -> None:
        """See the base class."""
        for name in COMPONENTS:
            _check(getattr(recipe, name), f"recipe.{name}")

    def check(self, lmm: LMM, recipe: RecipeConfig) -> None:
        """See the base class."""
        tunes: dict[str, TuneConfig] = {name: getattr(recipe, name) for name in COMPONENTS}
        lora.plan(lmm, recipe)
        for name, tune in tunes.items():
            if tune.tune == "partial":
                _layer_parameters(lmm, name, tune.from_layer)
            if tune.tune == "qlora":
                quantize.check(lmm, name, tune)
            if tune.layer_decay != 1.0:
                layer_count(lmm, name)
        if all(tune.tune == "frozen" for tune in tunes.values()):
            raise UserError(_ALL_FROZEN)

    def apply(self, lmm: LMM, recipe: RecipeConfig, *, seed: int) -> None:
        """See the base class. Raises UserError for a setting that this model cannot satisfy."""
        held = adapter.take(lmm)
        quantize.dequantize(lmm)
        wanted = lora.plan(lmm, recipe)
        continued = lora.merge_unless_continued(lmm, held, wanted)
        for name in COMPONENTS:
            tune: TuneConfig = getattr(recipe, name)
            _set_grad(getattr(lmm, name).parameters(), tune.tune == "full")
            if tune.tune == "partial":
                _set_grad(_layer_parameters(lmm, name, tune.from_layer), True)
            if tune.tune == "qlora":
                quantize.quantize(lmm, name, tune)
        if wanted is not None:
            trains = {p for p in lmm.parameters() if p.requires_grad}  # peft freezes all but its own
            lora.inject(lmm, wanted, continued, seed)
            _set_grad(lmm.parameters(), False)
            _set_grad(trains, True)
            lora.set_trainable(lmm, recipe)


def apply_recipe(lmm: LMM, recipe: RecipeConfig, optim: OptimConfig, *, seed: int = 0) -> list[ParameterGroup]:
    """Set requires_grad as the recipe says and return the trainable parameters in groups, each in exactly one.

    LoRA layers are injected, with weights drawn from the seed, and frozen layers quantized where the recipe says so. An
    adapter that the model has goes on if the recipe asks for the same one; otherwise it is merged first.
    Weight decay goes to matrices; biases, norms and embeddings have none. Raises UserError naming the config key if
    the recipe is unknown, does not fit the model, or trains nothing.
    """
    find_recipe(recipe).apply(lmm, recipe, seed=seed)
    groups = _groups(lmm, recipe, optim)
    if not groups:
        raise UserError(_ALL_FROZEN)
    _report(lmm)
    return groups


def check_recipe(lmm: LMM, recipe: RecipeConfig) -> None:
    """Raise UserError for what ``apply_recipe`` would refuse. The model has no adapter and is left as it is."""
    find_recipe(recipe).check(lmm, recipe)


def find_recipe(recipe: RecipeConfig) -> Recipe:
    """Return the registered recipe with its options. Raise UserError for an unknown name, option or kind of tuning."""
    cls = RECIPES.get(recipe.type, "recipe.type")
    found = cls(parse_into(cls.Options, recipe.options, "", key="recipe.options"))
    found.check_settings(recipe)
    return found


def check_engine(recipe: RecipeConfig, engine: EngineConfig, where: str) -> None:
    """Raise UserError for what this engine cannot train. where: key of the stage, for the message."""
    lora.check_engine(recipe, engine, where)
    quantize.check_engine(recipe, engine, where)


def _check(tune: TuneConfig, key: str) -> None:
    """Raise UserError for an unknown kind, or for settings that the kind at hand would ignore."""
    if tune.tune not in get_args(Tune):
        raise UserError(f"{key}.tune: {tune.tune!r}; {nearest(tune.tune, get_args(Tune))}")
    default = TuneConfig()
    readers = {"from_layer": ("partial",), "lora": lora.ADAPTED, "quant": ("qlora",), "double_quant": ("qlora",)}
    readers["layer_decay"] = tuple(kind for kind in get_args(Tune) if kind != "frozen")
    if key.endswith("connector") and tune.layer_decay != default.layer_decay:
        raise UserError(f"{key}.layer_decay: a connector has no layers to tell apart; leave it out, or set {key}.lr")
    for name, kinds in readers.items():
        if tune.tune not in kinds and getattr(tune, name) != getattr(default, name):
            raise UserError(
                f"{key}.{name}: set, but {key}.tune is {tune.tune!r} and would ignore it; remove it or set tune: "
                + " or ".join(kinds)
            )


def _groups(lmm: LMM, recipe: RecipeConfig, optim: OptimConfig) -> list[ParameterGroup]:
    groups: list[ParameterGroup] = []
    undecayed = {id(p) for m in lmm.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for component, parameters in lmm.component_parameters().items():
        tune: TuneConfig = getattr(recipe, component)
        lr = optim.lr if tune.lr is None else tune.lr
        by_rate: dict[Rate, list[nn.Parameter]] = {}
        rates = rates_of(lmm, component, tune)
        for _, p in parameters:
            if p.requires_grad:
                by_rate.setdefault(rates[id(p)], []).append(p)
        for (label, factor), trainable in by_rate.items():
            matrices = [p for p in trainable if _is_matrix(p) and id(p) not in undecayed]
            rest = [p for p in trainable if not (_is_matrix(p) and id(p) not in undecayed)]
            name, rate = f"{component}{label}", lr * factor
            if matrices:
                groups.append({"name": name, "params": matrices, "lr": rate, "weight_decay": optim.weight_decay})
            if rest:
                groups.append({"name": f"{name}.no_decay", "params": rest, "lr": rate, "weight_decay": 0.0})
    return groups


def _is_matrix(parameter: nn.Parameter) -> bool:
    # DeepSpeed's ZeRO-3 leaves an empty tensor behind; the true shape is in ds_shape.
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2


def _layer_parameters(lmm: LMM, component: str, from_layer: int) -> list[nn.Parameter]:
    key = f"recipe.{component}.from_layer"
    if component == "connector":
        raise UserError("recipe.connector.tune: a connector has no layers to choose from; use frozen or full")
    count = lmm.num_layers if component == "llm" else lmm.vision.num_layers
    if not 0 <= from_layer < count:
        raise UserError(f"{key}: {from_layer} is out of range; the {component} has {count} layers, use 0..{count - 1}")
    if component == "vision":
        return lmm.vision.layer_parameters(from_layer)
    layers = list(lmm.family.layers(lmm.llm))[from_layer:]
    return [p for layer in layers for p in layer.parameters()]


def _set_grad(parameters: Iterable[nn.Parameter], value: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(value)


def _size(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _report(lmm: LMM) -> None:
    log.info("%-10s %15s %15s", "component", "trainable", "parameters")
    for name, parameters in lmm.component_parameters().items():
        trainable = sum(_size(p) for _, p in parameters if p.requires_grad)
        log.info("%-10s %15s %15s", name, f"{trainable:,}", f"{sum(_size(p) for _, p in parameters):,}")
