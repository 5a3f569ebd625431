"""The linear layer of inference: the one place that chooses among the kernels for x Wᵀ.

    y = activation(x Wᵀ + bias) + residual            W dense, int8 or NF4

A few rows, as in decoding, go to ``decode_linear_fwd`` or ``linear_nf4_fwd``, which read the weight as it lies; many,
as of a prompt or an image, to ``prefill_linear`` where the CPU has tiles, and to torch elsewhere. How many are few
stands in _policy.TABLE. Legend: N rows of x, K inputs, O outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from tinyllava_fast.ops._policy import faster
from tinyllava_fast.ops.decode_block import silu_gate
from tinyllava_fast.ops.decode_linear import Int8, decode_linear_fwd, dequantize_int8, policy_name
from tinyllava_fast.ops.nf4 import NF4, dequantize_nf4, linear_nf4_fwd
from tinyllava_fast.ops.prefill_linear import ACTIVATIONS, prefill_linear


def linear(
    x: Tensor,
    weight: Tensor | Int8 | NF4,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Return activation(x Wᵀ + bias) + residual, by the kernel that is fastest for so many rows.

    x: [..., K] float. weight: [O, K] of x's dtype, Int8 or NF4. bias: [O], x's dtype. activation: of
    prefill_linear.ACTIVATIONS; behind "silu_gate" the result has O / 2 columns. residual: of the result's shape.
    Returns [..., O] of x's dtype. Raises ValueError for shapes and dtypes, and where a gradient is asked for: use
    functional.linear or linear_nf4.
    """
    tensors = [x, bias, residual, weight if isinstance(weight, Tensor) else None]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError("linear: it has no backward; call it under torch.inference_mode() or no_grad()")
    rows = math.prod(x.shape[:-1])
    flat = x.reshape(rows, x.shape[-1])
    shared = None if residual is None else residual.reshape(rows, residual.shape[-1])
    few = faster(policy_name(isinstance(weight, Int8)), x, rows=rows)
    in_tiles = not few and faster("prefill_linear", x)
    if in_tiles and not isinstance(weight, NF4):
        y = prefill_linear.infer(flat, *_values_and_scale(weight), bias, activation, shared)
        return y.view(*x.shape[:-1], y.shape[1])
    if in_tiles:
        y = prefill_linear.infer(flat, dense_weight(weight, x.dtype), None, bias, "none", None)
    elif isinstance(weight, NF4):
        y = linear_nf4_fwd.infer(flat, weight.packed, weight.absmax, *weight.shape, weight.blocksize, bias)
    elif few:
        y = decode_linear_fwd.infer(flat, *_values_and_scale(weight), bias)
    else:
        y = functional.linear(flat, dense_weight(weight, x.dtype), bias)
    y = finish_product(y, activation, shared)
    return y.view(*x.shape[:-1], y.shape[1])


def finish_product(y: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
    """Return what follows a product y [N, O], as ``linear`` takes it: activation(y) + residual."""
    y = silu_gate.infer(y) if activation == "silu_gate" else ACTIVATIONS[activation](y)
    return y if residual is None else residual + y


def _values_and_scale(weight: Tensor | Int8) -> tuple[Tensor, Tensor | None]:
    return weight if isinstance(weight, Int8) else (weight, None)


def dense_weight(weight: Tensor | Int8 | NF4, dtype: torch.dtype) -> Tensor:
    """Return the weight [O, K] as a plain tensor of dtype."""
    if isinstance(weight, NF4):
        return dequantize_nf4(*weight, dtype)
    return dequantize_int8(*weight, dtype) if isinstance(weight, Int8) else weight.to(dtype)
