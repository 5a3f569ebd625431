"""peft's LoRA layers with their parameters, names and files as they are, computing through the ``lora_linear`` op.

Only the forward of a layer is replaced, and only where it means the same: plain LoRA over a dense or nf4 weight. The op
keeps x and the rank-sized product alone for the backward pass, makes dropout masks anew, and computes no gradient
that nobody asked for.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from tinyllava_fast.log import log_once
from tinyllava_fast.ops.lora_linear import lora_linear
from tinyllava_fast.ops.nf4 import NF4, unpack_nf4

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitsandbytes.nn import Params4bit

    class AdaptedLayer(nn.Module):
        """A module with LoRA, of peft's: what we use of it. Its dictionaries are by the adapter's name."""

        adapter_layer_names: tuple[str, ...]
        base_layer: nn.Linear
        lora_A: dict[str, nn.Linear]  # noqa: N815 peft's name
        lora_B: dict[str, nn.Linear]  # noqa: N815
        lora_dropout: dict[str, nn.Module]
        lora_variant: dict[str, object]
        r: dict[str, int]
        lora_alpha: dict[str, float]
        scaling: dict[str, float]
        use_dora: dict[str, bool]
        use_rslora: dict[str, bool]
        disable_adapters: bool
        merged: bool
        external_parameters: Callable[[], list[nn.Parameter]]
        get_base_layer: Callable[[], nn.Module]
        merge: Callable[..., None]


def bind(layer: AdaptedLayer, name: str) -> None:
    """Let a peft LoraLayer compute through ``lora_linear``, or say once why it keeps peft's forward.

    name: of its only adapter. Scaling (rsLoRA, ranks of their own) and dropout are read at each call.
    """
    reason = _why_not(layer, name)
    if reason is not None:
        log_once(f"LoRA: layers of this model keep peft's own forward: {reason}")
        return
    layer.forward = MethodType(_forward, layer)  # not a partial, which torch.compile takes for another one each time
    layer.external_parameters = partial(_reads, layer, name)


def _why_not(layer: AdaptedLayer, name: str) -> str | None:
    base = layer.get_base_layer()
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__.removesuffix('LinearVariant')} is another formula"
    if type(base) is not nn.Linear and getattr(getattr(base, "weight", None), "quant_type", None) != "nf4":
        return f"its layers are {type(base).__name__}, whose weights lora_linear does not read"
    if layer.lora_B[name].bias is not None:
        return "lora_bias is set"
    if getattr(layer, "fan_in_fan_out", False):
        return "fan_in_fan_out is set"
    return None


def _forward(layer: AdaptedLayer, x: Tensor) -> Tensor:
    (name,) = layer.lora_A
    a, b, base = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.base_layer
    if layer.disable_adapters or layer.merged or not x.dtype == a.dtype == b.dtype:
        return _pefts(layer, x)  # peft casts; the op does not
    weight = _weight(base, x.dtype)
    if weight is None:
        return _pefts(layer, x)
    drop = layer.lora_dropout[name]
    p = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
    return lora_linear(x, weight, base.bias, a, b, layer.scaling[name], p)


def _pefts(layer: AdaptedLayer, x: Tensor) -> Tensor:
    out: Tensor = type(layer).forward(layer, x)
    return out


def _weight(base: nn.Linear, dtype: torch.dtype) -> Tensor | NF4 | None:
    """Return the weight as the op takes it; None if bitsandbytes would multiply by another one."""
    weight = base.weight
    if type(base) is nn.Linear:
        return weight if weight.dtype == dtype else None
    state = cast("Params4bit", weight).quant_state
    return unpack_nf4(weight.data, state) if state.dtype in (torch.float32, dtype) else None


def _reads(layer: AdaptedLayer, name: str) -> list[nn.Parameter]:
    """Return the parameters of other modules that the forward reads: ZeRO-3 has to gather them for it."""
    base = layer.base_layer
    used = (layer.lora_A[name].weight, layer.lora_B[name].weight, base.weight, base.bias)
    return [p for p in used if isinstance(p, nn.Parameter)]
