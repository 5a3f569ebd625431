"""LoRA adapters beside one base model, one of them or none for each request.

An adapter is known by a number that is never given twice, so K and V that one computed are not taken for another's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tinyllava_fast.errors import CheckpointError, UserError, nearest
from tinyllava_fast.infer.fast_model.adapted_linear import AdaptedLinear, Pass, Update
from tinyllava_fast.infer.fast_model.decoder_layer import PARTS, DecodeLayer
from tinyllava_fast.infer.fast_model.linear import DecodeLinear
from tinyllava_fast.infer.sampling import all_finite
from tinyllava_fast.models.adapter import FOLDER
from tinyllava_fast.models.checkpoints._lora import CONFIG, Lora, read_lora
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.models.weights_file import WEIGHTS
from tinyllava_fast.tensors import open_weights

_LARGE = 1 << 22  # elements
_ELSEWHERE = {"vision": "the vision tower", "connector": "the connector"}


class Place(NamedTuple):
    """Where a linear layer of the language model is. part: which of the layers that the module holds."""

    module: str
    part: int
    inputs: int
    sizes: tuple[int, ...]  # outputs of the module's layers


class Adapters:
    """The adapters of a model, by name. They change linear layers of the language model, of whatever storage."""

    def __init__(self, lmm: LMM) -> None:
        self.lmm = lmm
        self.current = Pass()
        self._places = _places(lmm)
        self._numbers: dict[str, int] = {}
        self._next = count(1)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._numbers)

    @property
    def names(self) -> list[str]:
        """Return their names."""
        return list(self._numbers)

    def number(self, name: str | None) -> int:
        """Return the number of an adapter, 0 for None. UserError if there is none of that name."""
        if name is None:
            return 0
        if (number := self._numbers.get(name)) is None:
            raise UserError(f"adapter {name!r} is not loaded; {nearest(name, self._numbers)}")
        return number

    def has(self, number: int) -> bool:
        """Return whether an adapter of this number, or no adapter for 0, is there."""
        return number == 0 or number in self._numbers.values()

    def read(self, folder: str | Path) -> dict[str, Update]:
        """Return the updates of an adapter folder by layer. folder: peft's, or a model folder that has one in it.

        Raises CheckpointError, naming file and layer, for what is missing, damaged, of another model, not plain LoRA,
        or not of the language model's linear layers.
        """
        path = Path(folder)
        if not (path / CONFIG).is_file() and (path / FOLDER / CONFIG).is_file():
            path = path / FOLDER
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder; give one that holds {CONFIG}")
        if path.name == FOLDER and (path.parent / WEIGHTS).is_file():
            self._check_beside(path.parent)
        if self.lmm.config.has_lora:
            raise CheckpointError(
                f"{path}: the base model keeps an adapter in its layers; load it merged (merge_adapter=True)"
            )

        def name_of(weight: str) -> str | None:
            component = weight.partition(".")[0]
            if component in _ELSEWHERE:
                raise CheckpointError(
                    f"{path}: it changes {weight.removesuffix('.weight')}, a layer of {_ELSEWHERE[component]}; an "
                    "adapter beside others may change the language model alone. Merge it into a model of its own: "
                    "tlf-convert merge"
                )
            return weight.removesuffix(".weight") if weight.removesuffix(".weight") in self._places else None

        lora = read_lora(path, name_of)
        return {name: self._update(lora, name, path) for name in lora.updates}

    def _check_beside(self, folder: Path) -> None:
        """Raise CheckpointError if a model folder with an adapter has other weights than the base model beside it.

        Such as a connector that trained with the adapter. Of the weights those are compared that are not large and that
        the model holds as they were trained.
        """
        held = dict(self.lmm.named_parameters(remove_duplicate=False))
        stored = open_weights(folder / WEIGHTS)
        for name, shape in stored.shapes.items():
            own = held.get(name, self._of_layer(name))
            if own is None or math.prod(shape) > _LARGE:
                continue
            if own.shape != shape or not torch.equal(stored[name].to(own.device, own.dtype), own):
                raise CheckpointError(
                    f"{folder / WEIGHTS}: {name} is not the base model's: it was trained beside the adapter, or the "
                    "adapter on another base; serve this folder as a model of its own"
                )

    def _of_layer(self, name: str) -> Tensor | None:
        """The weight or bias of a linear layer of the language model; None if it is none, or quantized."""
        layer, _, kind = name.rpartition(".")
        place = self._places.get(layer)
        if place is None:
            return None
        module: Any = stock(self.lmm.get_submodule(place.module))  # type: ignore[arg-type]
        both = (module.held, module.shift) if isinstance(module, DecodeLinear) else (module.weight, module.bias)
        found = both[kind == "bias"]
        return found.split(place.sizes)[place.part] if isinstance(found, Tensor) else None

    def _update(self, lora: Lora, name: str, path: Path) -> Update:
        stored_a, stored_b = lora.updates[name]
        place = self._places[name]
        expected = (place.sizes[place.part], place.inputs)
        if len(stored_a.shape) != 2 or len(stored_b.shape) != 2 or stored_a.shape[0] != stored_b.shape[1]:
            raise CheckpointError(
                f"{path}: {name}: lora_A {list(stored_a.shape)} and lora_B {list(stored_b.shape)} do not multiply"
            )
        if (found := (stored_b.shape[0], stored_a.shape[1])) != expected:
            raise CheckpointError(
                f"{path}: {name}: it is for a layer of {list(found)}, the model's is {list(expected)}: it was trained "
                "on another model"
            )
        a, b = stored_a.read(), stored_b.read()
        if not (a.is_floating_point() and b.is_floating_point() and all_finite(a) and all_finite(b)):
            raise CheckpointError(f"{path}: {name}: its numbers are not finite: it is damaged or the training diverged")
        scaled = b.float() * lora.scale(name)
        return Update(a.float(), scaled)

    def add(self, name: str, updates: Mapping[str, Update]) -> None:
        """Let requests name an adapter. UserError for a name that is taken, or empty."""
        if not name or name in self._numbers:
            raise UserError(f"adapter {name!r}: the name is empty or taken; give another one")
        number = next(self._next)
        by_module: dict[str, dict[int, Update]] = {}
        for layer, update in updates.items():
            place = self._places[layer]
            here = Update(*(t.to(self.lmm.device, self.lmm.dtype) for t in update))
            by_module.setdefault(place.module, {})[place.part] = here
        sizes = {place.module: place.sizes for place in self._places.values()}
        for module, parts in by_module.items():
            self._adapted(module, sizes[module]).put(number, parts)
        self._numbers[name] = number

    def merge(self, updates: Mapping[str, Update]) -> None:
        """Add an adapter to the weights, in float32, rounded once. The model must not be prepared for decoding yet."""
        for layer, update in updates.items():
            weight = self.lmm.get_parameter(f"{layer}.weight")
            a, b = (t.to(weight.device) for t in update)
            weight.data.copy_(torch.addmm(weight.data.float(), b, a))

    def remove(self, name: str) -> None:
        """Forget an adapter. UserError if there is none of that name."""
        number = self.number(name)
        del self._numbers[name]
        for name in {place.module: None for place in self._places.values()}:
            module = self.lmm.get_submodule(name)
            if isinstance(module, AdaptedLinear):
                module.drop(number)
                if not self._numbers:
                    self.lmm.set_submodule(name, module.base)

    def _adapted(self, name: str, sizes: tuple[int, ...]) -> AdaptedLinear:
        module = self.lmm.get_submodule(name)
        if not isinstance(module, AdaptedLinear):
            module = AdaptedLinear(module, sizes, self.current).eval()
            self.lmm.set_submodule(name, module)
        return module


def stock(layer: DecodeLinear) -> DecodeLinear:
    """Return a layer without the adapters that may stand around it."""
    base: DecodeLinear = getattr(layer, "base", layer)
    return base


def _places(lmm: LMM) -> dict[str, Place]:
    """Return where each linear layer of the language model is, by the name it has in model folders."""
    found: dict[str, Place] = {}
    parts_of: set[str] = set()  # modules that DecodeLayers are made of
    head = lmm.llm.get_output_embeddings()
    for name, module in lmm.llm.named_modules(prefix="llm"):
        if isinstance(module, DecodeLayer):
            for product, parts in PARTS.items():
                linear: DecodeLinear = getattr(module, product)
                parts_of.add(f"{name}.{product}")
                for index, part in enumerate(parts):
                    at = Place(f"{name}.{product}", index, linear.in_features, tuple(linear.sizes))
                    found[f"{name}.{part}"] = at
        elif isinstance(module, (nn.Linear, DecodeLinear)) and module is not head and name not in parts_of:
            found[name] = Place(name, 0, module.in_features, (module.out_features,))
    return found
