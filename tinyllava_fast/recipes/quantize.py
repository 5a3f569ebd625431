"""QLoRA (arXiv 2305.14314): frozen linear layers kept in 4 or 8 bits by bitsandbytes.

Model folders never hold quantized storage: ``plain_weights`` writes what the layers computed with, dequantized, in the
training dtype, so a folder of a QLoRA stage is an ordinary one with an adapter. (TinyLLaVA Factory stored int8 without
its scales.) The next qlora stage quantizes these values anew; that is exact for int8, and within the grid for nf4.
Training checkpoints hold the quantized tensors themselves, bit for bit.

What bitsandbytes 0.50 cannot do is refused by name: see ``quantize`` and ``check_engine``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tinyllava_fast.config.schema import EngineConfig, RecipeConfig, TuneConfig
from tinyllava_fast.errors import CheckpointError, UserError, import_optional
from tinyllava_fast.models.lmm import COMPONENTS, LMM
from tinyllava_fast.recipes.linears import linears

BLOCK = 64  # weights that share a scale in nf4


def check_engine(recipe: RecipeConfig, engine: EngineConfig, where: str) -> None:
    """Raise UserError if the engine cannot train quantized layers."""
    for component in _quantized(recipe):
        sharding = "engine.type: fsdp" if engine.type == "fsdp" else f"engine.zero_stage: {engine.zero_stage}"
        if engine.sharding == 3:
            raise UserError(
                f"{where}.recipe.{component}.tune: qlora with {sharding}, which would shard packed weights apart from "
                "their scales; set engine.type: ddp or engine.zero_stage: 2, or tune: lora"
            )


def quantize(lmm: LMM, component: str, tune: TuneConfig) -> None:
    """Replace every linear layer of a component but the output head by bitsandbytes' own, frozen.

    Raises UserError if bitsandbytes does not import, or a layer has a shape that it gets wrong on this device.
    """
    bnb = check(lmm, component, tune)
    for name, linear in list(linears(lmm, component)):
        lmm.set_submodule(name, _quantized_layer(bnb, linear, tune))


def check(lmm: LMM, component: str, tune: TuneConfig) -> ModuleType:
    """Return bitsandbytes. Raise UserError if it does not import, or gets a layer wrong on this device."""
    bnb = import_optional("bitsandbytes", f"recipe.{component}.tune: qlora")
    for name, linear in linears(lmm, component):
        device = linear.weight.device
        if tune.quant == "nf4" and device.type == "cpu" and linear.in_features % BLOCK:
            raise UserError(
                f"recipe.{component}.quant: nf4, but {name} has {linear.in_features} inputs, and on a CPU bitsandbytes "
                f"dequantizes only multiples of {BLOCK} correctly; set quant: int8"
            )
    return bnb


def dequantize(lmm: LMM) -> None:
    """Put plain linear layers, in the dtype of the model, in the place of quantized ones. The model has no adapter."""
    for name, layer in list(quantized_layers(lmm)):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(dequantized(layer, lmm.dtype))
        linear.bias = layer.bias
        lmm.set_submodule(name, linear.train(layer.training))


def quantized_layers(lmm: LMM) -> Iterator[tuple[str, nn.Linear]]:
    """Yield (name, module) of every layer that bitsandbytes keeps quantized."""
    for name, module in lmm.named_modules():
        if isinstance(module, nn.Linear) and type(module.weight).__name__ in ("Params4bit", "Int8Params"):
            yield name, module


def dequantized(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] that the layer multiplies by at activations of ``dtype``, to the bit."""
    import bitsandbytes as bnb

    quantized: Any = layer
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, quantized.weight.quant_state).to(dtype)
    return layer.weight.data.to(dtype).mul_(quantized.state.SCB.unsqueeze(1).mul(1.0 / 127.0))


def plain_weights(lmm: LMM, weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the state dict with plain tensors for quantized ones. dtype: of the activations in training."""
    drop, plain = state_names(lmm), dict(weights)
    for name in drop:
        plain.pop(name, None)
    for name, layer in quantized_layers(lmm):
        plain[f"{name}.weight"] = dequantized(layer, dtype)
    return plain


def state_names(lmm: LMM) -> set[str]:
    """Return the state-dict names of quantized weights and of their scales."""
    names: set[str] = set()
    for name, layer in quantized_layers(lmm):
        names |= {f"{name}.{key}" for key in layer.state_dict() if key != "bias"}
    return names


def load_state(lmm: LMM, tensors: Mapping[str, Tensor]) -> None:
    """Restore quantized weights from a training checkpoint, bit for bit. Raises CheckpointError naming what lacks."""
    for name, layer in quantized_layers(lmm):
        stored = {key: tensors[key] for key in tensors if key.startswith(f"{name}.weight") or key == f"{name}.SCB"}
        found = {key.removeprefix(f"{name}."): t for key, t in stored.items()}
        try:
            _restore(layer, found)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{name}: its quantized weight cannot be restored: {error}") from None


def _restore(layer: nn.Linear, found: dict[str, Tensor]) -> None:
    import bitsandbytes as bnb

    device = layer.weight.device
    weight = found.pop("weight")
    if weight.shape != layer.weight.shape or weight.dtype != layer.weight.dtype:
        raise ValueError(f"stored {weight.dtype} {list(weight.shape)}, the layer has {list(layer.weight.shape)}")
    if isinstance(layer, bnb.nn.Linear4bit):
        scales = {key.removeprefix("weight."): t for key, t in found.items()}
        layer.weight = bnb.nn.Params4bit.from_prequantized(weight, scales, device=device, module=layer)
        return
    layer.weight = bnb.nn.Int8Params(
        weight.to(device), requires_grad=False, CB=weight.to(device), SCB=found["SCB"].to(device)
    )
    _settle(layer)


def _quantized_layer(bnb: ModuleType, linear: nn.Linear, tune: TuneConfig) -> nn.Module:
    shape = (linear.in_features, linear.out_features)
    if tune.quant == "nf4":
        layer = bnb.nn.Linear4bit(*shape, bias=False, device="meta", quant_type="nf4")
        # In evaluation it would repack the weight into a layout whose kernel fails for some widths.
        layer.support_avx512bf16_for_cpu = False
        layer.weight = bnb.nn.Params4bit(
            linear.weight.detach(), quant_type="nf4", compress_statistics=tune.double_quant, module=layer
        )
    else:
        layer = bnb.nn.Linear8bitLt(*shape, bias=False, device="meta", has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.detach(), requires_grad=False)
    layer.bias = linear.bias
    device = linear.weight.device
    layer.weight = layer.weight.to(device)  # this is where it quantizes
    _settle(layer)
    return layer.train(linear.training)


def _settle(layer: Any) -> None:
    """Set the state that a layer sets at its first forward pass, which would invalidate a compiled graph."""
    if layer.weight.dtype == torch.int8:
        layer.init_8bit_state()
    else:
        layer.compute_type_is_set = True  # to None: that of the activations


def _quantized(recipe: RecipeConfig) -> dict[str, TuneConfig]:
    tunes = {name: getattr(recipe, name) for name in COMPONENTS}
    return {name: tune for name, tune in tunes.items() if tune.tune == "qlora"}
