"""The learning rate of each parameter within its component: layer by layer, and LoRA's B apart from A.

layer-wise decay   a parameter of layer i of n (from 0) has lr decay^(n - i), what lies above the layers lr, what lies
                   below them, the embedding, lr decay^(n + 1)  (arXiv 1801.06146, 2003.10555)
LoRA+              B has ratio times the rate of its A (arXiv 2402.12354)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from tinyllava_fast.config.schema import TuneConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.models import adapter
from tinyllava_fast.models.lmm import LMM

LORA_B = "lora_b"
BELOW, ABOVE = "below", "above"
Rate = tuple[str, float]
"""The end of a group's name (".layer3.lora_b"; "" for the plain rate), and the factor of the component's rate."""


def rates_of(lmm: LMM, component: str, tune: TuneConfig) -> dict[int, Rate]:
    """Return the rate of each parameter of a component, by its ``id``. UserError if it has no layers to tell apart."""
    parameters = [p for _, p in lmm.component_parameters()[component]]
    found: dict[int, Rate] = {id(p): ("", 1.0) for p in parameters}
    if tune.layer_decay != 1.0:
        found |= _by_depth(lmm, component, tune.layer_decay)
    if tune.lora.b_lr_ratio != 1.0:
        for p in adapter.b_parameters(lmm, component):
            label, factor = found[id(p)]
            found[id(p)] = f"{label}.{LORA_B}", factor * tune.lora.b_lr_ratio
    return found


def layer_factor(decay: float, layers: int, depth: int) -> float:
    """Return the factor of a rate. depth: 0 below the layers, i + 1 in layer i, layers + 1 above them."""
    return float(decay ** (layers + 1 - depth))


def layer_count(lmm: LMM, component: str) -> int:
    """Return the number of layers that the rates of a component tell apart. UserError if there are none."""
    return max(len(stack) for _, stack in _stacks(lmm, component))


def _by_depth(lmm: LMM, component: str, decay: float) -> Iterator[tuple[int, Rate]]:
    for prefix, stack in _stacks(lmm, component):
        depths = {id(p): number + 1 for number, layer in enumerate(stack) for p in layer.parameters()}
        reached = False
        for name, p in lmm.component_parameters()[component]:
            if not name.startswith(prefix):
                continue
            depth = depths.get(id(p))
            reached = reached or depth is not None
            if depth is None:
                depth = len(stack) + 1 if reached else 0  # modules stand in the order in which they run
            label = BELOW if depth == 0 else ABOVE if depth > len(stack) else f"layer{depth - 1}"
            yield id(p), (f".{label}", layer_factor(decay, len(stack), depth))


def _stacks(lmm: LMM, component: str) -> list[tuple[str, Sequence[nn.Module]]]:
    """Return the stacks of layers of a component, each with what the names of its part begin with ("": all of it).

    A mixture of two towers has two.
    """
    found: list[nn.Module] = []
    if component == "llm":
        found = list(lmm.family.layers(lmm.llm))
    elif component == "vision":
        found = list(lmm.vision.layers)
    if not found:
        what = "vision tower" if component == "vision" else component
        raise UserError(f"recipe.{component}.layer_decay: this {what} names no layers; leave it out")
    names = {id(module): name for name, module in getattr(lmm, component).named_modules()}
    stacks: dict[str, list[nn.Module]] = {}
    for layer in found:
        stacks.setdefault(names[id(layer)].rpartition(".")[0], []).append(layer)
    if len(stacks) == 1:
        return [("", found)]
    return [(f"{name.partition('.')[0]}.", stack) for name, stack in stacks.items()]
