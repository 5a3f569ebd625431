"""LoRA adapters as peft has them, injected into a model in place, and peft's own folder format.

    adapter/adapter_config.json        peft's LoraConfig, target_modules as full dotted names
    adapter/adapter_model.safetensors  base_model.model.llm.model.layers.0.self_attn.q_proj.lora_A.weight, ...

One adapter covers every component that has LoRA layers. Names are those of the LMM, so that
``peft.PeftModel.from_pretrained(lmm, folder)`` reads what is written here, and an adapter that peft trained on an LMM
loads here. Whatever else trained is in model.safetensors, biases of adapted layers included.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinyllava_fast.errors import CheckpointError, import_optional
from tinyllava_fast.fields import Fields, read_json
from tinyllava_fast.models import adapter_forward
from tinyllava_fast.models.described import reading
from tinyllava_fast.models.hf import cast_parameters, seeded
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.ops.adamw import dither
from tinyllava_fast.tensors import mismatches

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch.nn.modules.module import _IncompatibleKeys

    from tinyllava_fast.models.adapter_forward import AdaptedLayer

FOLDER = "adapter"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"  # peft's name for the only adapter
_PREFIX = "base_model.model."


class LayerSettings(NamedTuple):
    """The settings that decide the shape and the scale of one layer's adapter."""

    r: int
    alpha: float
    rslora: bool
    dora: bool


@dataclass
class Adapter:
    """An adapter off its model. config: peft's LoraConfig. tensors: by peft's names, without its prefix."""

    config: LoraConfig
    tensors: dict[str, Tensor]
    layers: dict[str, LayerSettings]


def import_peft() -> ModuleType:
    """Return the peft module. Raise UserError if it does not import."""
    return import_optional("peft", "LoRA")


def layers(lmm: LMM) -> Iterator[tuple[str, AdaptedLayer]]:
    """Yield the name and the module of every adapted layer."""
    if not lmm.config.has_lora:
        return
    lora_layer = import_peft().tuners.lora.LoraLayer
    for name, module in lmm.named_modules():
        if isinstance(module, lora_layer):
            yield name, module


def parameter_names(lmm: LMM) -> list[str]:
    """Return the state-dict names of the adapter's own tensors."""
    return [
        f"{name}.{key}"
        for name, layer in layers(lmm)
        for key in layer.state_dict()
        if not key.startswith("base_layer.")
    ]


def parameters_of(layer: AdaptedLayer) -> Iterator[nn.Parameter]:
    """The adapter's parameters in one layer."""
    return (p for name in layer.adapter_layer_names for p in getattr(layer, name).parameters())


def b_parameters(lmm: LMM, component: str) -> Iterator[nn.Parameter]:
    """The matrices B, which start at zero, of a component's adapters."""
    for name, layer in layers(lmm):
        if name.partition(".")[0] == component:
            yield from (p for linear in layer.lora_B.values() for p in linear.parameters())


def inject(lmm: LMM, config: LoraConfig, *, seed: int = 0, dtype: torch.dtype | None = None) -> None:
    """Wrap the layers that a peft LoraConfig names, in place; A is drawn from the seed, B is zero (peft's start).

    Quantized layers of bitsandbytes get peft's wrappers for them. Layers compute through lora_linear where they can.
    dtype: of the new weights; None: the model's.
    """
    inject_in_place = import_peft().inject_adapter_in_model
    dtype = dtype or lmm.dtype
    # peft asks the model, not the layer, whether bitsandbytes' layers may be in it.
    asked = dict.fromkeys(("is_loaded_in_4bit", "is_loaded_in_8bit"), True)
    vars(lmm).update(asked)
    try:
        with seeded(seed):
            inject_in_place(copy.deepcopy(config), lmm, _NAME)
    finally:
        for name in asked:
            delattr(lmm, name)
    lmm.config = replace(lmm.config, has_lora=True)
    for _, layer in layers(lmm):
        for parameter in parameters_of(layer):
            parameter.data = parameter.data.to(dtype)
        adapter_forward.bind(layer, _NAME)


def attach(lmm: LMM, adapter: Adapter, where: str, *, dtype: torch.dtype | None = None) -> None:
    """Inject an adapter and fill it. Raises CheckpointError naming tensors that do not fit."""
    with reading(f"{where}: the adapter does not fit this model"):
        inject(lmm, adapter.config, dtype=dtype)
    for name, layer in layers(lmm):
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear) or layer is lmm.llm.get_output_embeddings():
            raise CheckpointError(
                f"{where}: adapts {name}, a {type(base).__name__} whose weight this package reads directly, past its "
                "adapter; only linear layers other than the output head are supported"
            )
    fill(lmm, adapter.tensors, where)


def fill(lmm: LMM, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors, by peft's names, into a model's adapter. Raises CheckpointError naming those that do not fit."""
    from peft.utils import set_peft_model_state_dict

    with reading(f"{where}: the adapter does not fit this model"):
        outcome = cast("_IncompatibleKeys", set_peft_model_state_dict(lmm, dict(tensors), _NAME))
    own = dict.fromkeys(parameter_names(lmm))
    found = [*(name for name in own if name not in outcome.missing_keys), *outcome.unexpected_keys]
    if lines := mismatches(own, dict.fromkeys(found)):
        raise CheckpointError(f"{where}: the adapter is of another architecture:\n" + "\n".join(lines))


def lower(lmm: LMM, dtype: torch.dtype) -> None:
    """Cast the adapter from float32 as an optimizer rounds its masters, so that it is what was trained, bit for bit."""
    for _, layer in layers(lmm):
        for parameter in parameters_of(layer):
            rounded = torch.empty_like(parameter, dtype=dtype)
            dither(parameter.data, rounded)
            parameter.data = rounded


def take(lmm: LMM) -> Adapter | None:
    """Unwrap every layer without merging and return the adapter; None where there is none."""
    if not lmm.config.has_lora:
        return None
    config = _full_config(lmm)
    tensors = {k: t.detach().clone() for k, t in _tensors(lmm, lmm.state_dict()).items()}
    settings = layer_settings(lmm)
    _unwrap(lmm)
    return Adapter(config, tensors, settings)


def merge(lmm: LMM, dtype: torch.dtype | None = None) -> None:
    """Add the adapter to the weights and unwrap. The sums are float32, rounded once, to dtype (None: the weight's)."""
    for _, layer in layers(lmm):
        target = dtype or layer.base_layer.weight.dtype
        layer.float()
        layer.merge(adapter_names=[_NAME])
        cast_parameters(layer.get_base_layer(), target)
    _unwrap(lmm)


def layer_settings(lmm: LMM) -> dict[str, LayerSettings]:
    """Return the settings of each adapted layer."""
    return {
        name: LayerSettings(
            layer.r[_NAME], layer.lora_alpha[_NAME], layer.use_rslora.get(_NAME, False), layer.use_dora[_NAME]
        )
        for name, layer in layers(lmm)
    }


def set_dropout(lmm: LMM, share: Mapping[str, float]) -> None:
    """Dropout on the input of each adapter, by component; in peft's config there is one for all."""
    for name, layer in layers(lmm):
        p = share[name.partition(".")[0]]
        layer.lora_dropout[_NAME] = nn.Dropout(p) if p > 0 else nn.Identity()


def split(lmm: LMM, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State-dict tensors as (model weights under stock names, adapter tensors under peft's names without prefix)."""
    own = set(parameter_names(lmm))
    wrapped = [name for name, _ in layers(lmm)]
    stock = {f"{name}.base_layer.": f"{name}." for name in wrapped}

    def rename(key: str) -> str:
        head, found, leaf = key.rpartition(".base_layer.")
        return stock[head + found] + leaf if found and head + found in stock else key

    base = {rename(k): t for k, t in weights.items() if k not in own}
    return base, _tensors(lmm, {k: t for k, t in weights.items() if k in own})


def write(lmm: LMM, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapter folder of a model that has one; tensors as ``split`` returns them."""
    write_folder(_full_config(lmm), tensors, folder)


def write_folder(config: LoraConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write an adapter folder. config: peft's LoraConfig. tensors: by peft's names, without its prefix."""
    folder.mkdir()
    config.inference_mode = True  # as peft itself stores it
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    (folder / _CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    stored = {_PREFIX + k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    save_file(stored, folder / _WEIGHTS, metadata={"format": "pt"})


def read(folder: Path) -> Adapter:
    """Read an adapter folder. Raises CheckpointError if it is incomplete, damaged, or no LoRA."""
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing; the adapter is incomplete")
    peft = import_peft()
    fields = Fields.of(read_json(folder / _CONFIG, CheckpointError), str(folder / _CONFIG), CheckpointError)
    kind = fields.values.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{folder / _CONFIG}: peft_type is {kind!r}; only LORA adapters are supported")
    with reading(f"{folder / _WEIGHTS}: damaged or truncated safetensors file"):
        tensors = load_file(folder / _WEIGHTS)
    _check_ranks(fields, tensors)
    with reading(f"{folder / _CONFIG}: not a peft adapter config"):
        config = peft.LoraConfig.from_pretrained(str(folder))
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise CheckpointError(
            f"{folder / _CONFIG}: init_lora_weights is {config.init_lora_weights!r}, which changes the base weights "
            "when it is injected; convert it with peft's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for key in ("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication"):
        if getattr(config, key, None):
            raise CheckpointError(f"{folder / _CONFIG}: {key} is set; only LoRA of linear layers is supported")
    config.inference_mode = False
    return Adapter(config, {k.removeprefix(_PREFIX): t for k, t in tensors.items()}, {})


def _check_ranks(fields: Fields, tensors: Mapping[str, Tensor]) -> None:
    """Raise for a rank, scale, switch or pattern that is none, and for a rank that no stored tensor has."""
    most = max((max(t.shape, default=1) for t in tensors.values()), default=1)
    patterns = (fields.mapping(name, None) for name in ("rank_pattern", "alpha_pattern"))
    ranks, alphas = (pattern or Fields({}, fields.where, CheckpointError) for pattern in patterns)
    for owner, name in ((fields, "r"), *((ranks, name) for name in ranks.values)):
        if owner.integer(name, least=1) > most:
            owner.fail(name, f"a rank of at most {most}, as large as a stored tensor", owner.values[name])
    for name in ("use_rslora", "use_dora", "fan_in_fan_out"):
        fields.boolean(name, False)
    for owner in (ranks, alphas):
        for name in owner.values:
            with reading(f"{owner.where}: {name}: not a regular expression"):
                re.compile(name)
    for owner, name in ((fields, "lora_alpha"), *((alphas, name) for name in alphas.values)):
        owner.number(name)


def _tensors(lmm: LMM, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not lmm.config.has_lora:
        return {}
    from peft.utils import get_peft_model_state_dict

    own = {k: weights[k] for k in parameter_names(lmm)}
    return get_peft_model_state_dict(lmm, state_dict=own, adapter_name=_NAME, save_embedding_layers=False)


def _full_config(lmm: LMM) -> LoraConfig:
    """The LoraConfig with every layer named in full; peft shortens long lists to ends that happen to be unique."""
    config: LoraConfig = copy.deepcopy(vars(lmm)["peft_config"][_NAME])
    config.target_modules = sorted(name for name, _ in layers(lmm))
    config.bias = "none"  # trained biases are the model's own weights
    return config


def _unwrap(lmm: LMM) -> None:
    for name, layer in list(layers(lmm)):
        lmm.set_submodule(name, layer.get_base_layer())
    del lmm.peft_config
    lmm.config = replace(lmm.config, has_lora=False)
