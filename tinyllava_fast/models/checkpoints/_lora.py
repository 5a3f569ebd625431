"""Low-rank adapters of other projects, as peft stores them: renamed to our modules, merged: W <- W + scale * B A.

Source: Hu et al., arXiv 2106.09685. Merging is done in float32 whatever the weights are stored in: in float16 the
logits of a TinyLLaVA Factory model move by up to 0.05.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.fields import Fields, read_json
from tinyllava_fast.models.architecture import Values
from tinyllava_fast.models.checkpoints._tensors import Stored, read_tensors
from tinyllava_fast.models.described import reading

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NO_USE = ""  # our name for a weight that the model leaves out, such as those of tower layers above the one read
_FILES = (WEIGHTS, "adapter_model.bin")
_PREFIX = "base_model.model."
_RANK, _ALPHA = 8, 8.0  # peft's defaults
_SETTINGS = ("r", "lora_alpha", "lora_dropout", "use_rslora")
# Features of peft that change what an adapter means; their neutral values.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


@dataclass(frozen=True)
class Lora:
    """An adapter. config: peft's, checked. updates: A [r, in] and B [out, r] by the name of the weight they change."""

    config: Fields
    updates: dict[str, tuple[Stored, Stored]]

    def alpha(self, name: str) -> float:
        """alpha of a weight's update; peft's patterns match the end of the module's stored name."""
        module = _module(self.updates[name][0].key)
        patterns = self.config.mapping("alpha_pattern", None)
        if patterns is not None and module is not None:
            for pattern in patterns.values:
                if re.fullmatch(rf"(.*\.)?({pattern})", module[1]):
                    return patterns.number(pattern)
        return self.config.number("lora_alpha", _ALPHA)

    def scale(self, name: str) -> float:
        """Return the factor of a weight's update: alpha / r, or alpha / sqrt(r) for rank-stabilized adapters."""
        rank = self.updates[name][0].shape[0]
        return self.alpha(name) / (math.sqrt(rank) if self.config.boolean("use_rslora", False) else rank)

    def merge(self, weights: Mapping[str, Stored], where: str) -> dict[str, Stored]:
        """Return the weights with the updates added, still unread. Raises CheckpointError where they do not fit."""
        merged = dict(weights)
        for name, (a, b) in self.updates.items():
            if name not in merged:
                raise CheckpointError(f"{where}: the adapter changes {name}, which the checkpoint does not have")
            if (shape := (b.shape[0], a.shape[1])) != merged[name].shape or a.shape[0] != b.shape[1]:
                raise CheckpointError(
                    f"{where}: adapter of {name}: A {list(a.shape)} and B {list(b.shape)} make {list(shape)}, "
                    f"the weight is {list(merged[name].shape)}"
                )
            merged[name] = replace(merged[name], read=self._reader(name, merged[name]))
        return merged

    def _reader(self, name: str, base: Stored) -> Callable[[], Tensor]:
        a, b = self.updates[name]

        def read() -> Tensor:
            update = b.read().to(torch.float32) @ a.read().to(torch.float32)
            return torch.add(base.read().to(torch.float32), update, alpha=self.scale(name))

        return read

    def for_peft(self) -> tuple[Values, dict[str, Tensor]]:
        """(settings of a LoraConfig with our module names, tensors by peft's names without its prefix)."""
        modules = {name: name.removesuffix(".weight") for name in self.updates}
        rank, alpha = self.config.integer("r", _RANK), self.config.number("lora_alpha", _ALPHA)
        settings: Values = {key: self.config.values[key] for key in _SETTINGS if key in self.config}
        settings |= {
            "target_modules": list(modules.values()),
            "rank_pattern": {modules[name]: a.shape[0] for name, (a, _) in self.updates.items() if a.shape[0] != rank},
            "alpha_pattern": {modules[name]: self.alpha(name) for name in self.updates if self.alpha(name) != alpha},
        }
        tensors = {
            f"{modules[name]}.lora_{letter}.weight": stored.read()
            for name, pair in self.updates.items()
            for letter, stored in zip("AB", pair, strict=True)
        }
        return settings, tensors


def read_lora(folder: Path, rename: Callable[[str], str | None]) -> Lora:
    """Return the adapter of a folder.

    rename: the weight's name in the wrapped model -> our name, None if we have no such weight, NO_USE if it is one that
    the model leaves out.
    Raises CheckpointError for a kind of adapter that is not plain LoRA, and for tensors that do not pair up.
    """
    path = folder / CONFIG
    fields = Fields.of(read_json(path, CheckpointError), str(path), CheckpointError)
    _check(fields)
    config = fields.values
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise CheckpointError(f"{path}: peft_type is {config['peft_type']!r}; only LORA is supported")
    for key, neutral in _NEUTRAL.items():
        if config.get(key) not in neutral and config.get(key) is not None:
            raise CheckpointError(f"{path}: {key} is {config[key]!r}; only plain LoRA is supported")
    file = next((folder / name for name in _FILES if (folder / name).is_file()), folder / WEIGHTS)
    return Lora(fields, _pairs(read_tensors(file), rename, str(file)))


def _check(fields: Fields) -> None:
    """Raise for a setting that merging reads and that is not of its kind."""
    fields.text("peft_type", None)
    fields.integer("r", _RANK, least=1)
    fields.number("lora_alpha", _ALPHA)
    fields.number("lora_dropout", 0, least=0)
    fields.boolean("use_rslora", False)
    if patterns := fields.mapping("alpha_pattern", None):
        for name in patterns.values:
            patterns.number(name)
            with reading(f"{patterns.where}: {name}: not a regular expression"):
                re.compile(name)


def _module(key: str) -> re.Match[str] | None:
    """Return the module (group 1) and the letter (group 2) of a stored name."""
    return re.fullmatch(rf"(?:{re.escape(_PREFIX)})?(.+)\.lora_([AB])(?:\.default)?\.weight", key)


def _pairs(
    tensors: Mapping[str, Stored], rename: Callable[[str], str | None], where: str
) -> dict[str, tuple[Stored, Stored]]:
    halves: dict[str, dict[str, Stored]] = {}
    strange = []
    for key, stored in tensors.items():
        match = _module(key)
        name = rename(f"{match[1]}.weight") if match else None
        if match is None or name is None:
            strange.append(f"{key} {list(stored.shape)}")
        elif name != NO_USE:
            halves.setdefault(name, {})[match[2]] = stored
    if strange:
        raise CheckpointError(
            f"{where}: not updates of this model's linear layers: {', '.join(strange)}. Add the adapter to the weights "
            "where it was trained (peft's merge_and_unload, save_pretrained) and give the merged folder"
        )
    single = [f"{name} has only lora_{'/'.join(half)}" for name, half in halves.items() if len(half) < 2]
    if single or not halves:
        raise CheckpointError(f"{where}: {', '.join(single) or 'holds no update at all'}")
    return {name: (half["A"], half["B"]) for name, half in sorted(halves.items())}
