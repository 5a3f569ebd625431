"""Linear layers of a prompt or an image: some tens to thousands of rows of x times a weight in its stock layout.

    y = x Wᵀ + bias                    W dense in x's dtype
    y = (x Qᵀ) scale + bias            W = Q scale, Q int8, one float32 scale an output

A GEMM library packs the weight in every call, which a few hundred rows do not pay back. On AMX tiles the weight is the
left operand and enters as it lies in memory; x alone is packed. Sums are float32; int8 weights enter exactly. What
follows the product in a transformer layer is applied to the sums while the tiles work on the next ones:

    gelu_tanh, quick_gelu   f(y)                                    quick_gelu: y sigmoid(1.702 y)
    silu_gate               silu(gate) up, the outputs being the gate and then up     (arXiv 2002.05202)
    residual                + r                                     after the activation, which is rounded before

Inference only: there is no backward. Legend: N rows of x, K inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from tinyllava_fast.errors import nearest
from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._check import FLOATS, expect
from tinyllava_fast.ops._op import Sample, define_op
from tinyllava_fast.ops._policy import faster
from tinyllava_fast.ops.decode_block import silu_gate

_BLOCK = 32  # rows and columns of packed pieces


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    "silu_gate": silu_gate.reference,
}
"""By name, in the order of their numbers in C++."""


def check_product(op: str, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
    """Raise ValueError unless x [N, K], weight [O, K] in x's dtype or int8 with its scale, and bias [O] multiply."""
    expect(op, "x", x, "N K", FLOATS)
    expect(op, "weight", weight, "O K", (x.dtype if scale is None else torch.int8,), like=x)
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: x has {x.shape[1]} columns, the weight has {weight.shape[1]}")
    for name, tensor, dtype in (("scale", scale, torch.float32), ("bias", bias, x.dtype)):
        if tensor is None:
            continue
        expect(op, name, tensor, "O", (dtype,), like=x)
        if tensor.shape[0] != weight.shape[0]:
            raise ValueError(f"{op}: {name} has {tensor.shape[0]} entries for {weight.shape[0]} outputs")


def reference_product(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias in plain torch, int8 weights by exact sums."""
    if scale is None:
        return functional.linear(x, weight, bias)
    sums = x.double() @ weight.double().t() if x.dtype == torch.float64 else x.float() @ weight.float().t()
    scaled = sums * scale.to(sums.dtype)
    return (scaled if bias is None else scaled + bias.to(sums.dtype)).to(x.dtype)


def _width(outputs: int, activation: str) -> int:
    return outputs // 2 if activation == "silu_gate" else outputs


def _check(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str, residual: Tensor | None
) -> None:
    check_product("prefill_linear", x, weight, scale, bias)
    if activation not in ACTIVATIONS:
        raise ValueError(f"prefill_linear: activation {activation!r}; {nearest(activation, ACTIVATIONS)}")
    outputs = weight.shape[0]
    if activation == "silu_gate" and outputs % 2:
        raise ValueError(f"prefill_linear: {outputs} outputs, expected gate and up side by side")
    if residual is not None:
        expect("prefill_linear", "residual", residual, "N O", (x.dtype,), like=x)
        if residual.shape != (x.shape[0], _width(outputs, activation)):
            raise ValueError(
                f"prefill_linear: residual is {list(residual.shape)}, the result "
                f"{[x.shape[0], _width(outputs, activation)]}"
            )


def _cpp_forward(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Tensor:
    if not faster("prefill_linear", x) or x.shape[1] == 0:
        return prefill_linear.reference(x, weight, scale, bias, activation, residual)
    x, weight = _cpp.unit_stride(x), weight.contiguous()
    scale, bias, residual = (None if t is None else t.contiguous() for t in (scale, bias, residual))
    (rows, columns), outputs = x.shape, weight.shape[0]
    y = torch.empty(rows, _width(outputs, activation), dtype=x.dtype)
    if y.numel() == 0:
        return y
    padded = _up(rows) + _BLOCK * torch.get_num_threads()
    scratch = _cpp.scratch(2 * padded * _up(columns))
    pointers = (0 if t is None else t.data_ptr() for t in (scale, bias))
    _cpp.extension().prefill_linear(
        *(x.data_ptr(), x.stride(0), weight.data_ptr(), *pointers, _NUMBERS[activation]),
        *(0 if residual is None else residual.data_ptr(), scratch.data_ptr(), y.data_ptr()),
        *(rows, outputs, columns),
    )
    return y


_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


def _up(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)
    shapes = ((17, 48, 96), (40, 37, 100), (33, 130, 35), (3, 6, 7), (0, 4, 8), (3, 5, 0), (2, 0, 8))
    for at, (rows, outputs, columns) in enumerate(shapes):
        weight = torch.randn(outputs, columns, generator=g) / max(1, columns) ** 0.5
        x = torch.randn(columns, rows, generator=g).t() if rows % 2 else torch.randn(rows, columns, generator=g)
        bias = torch.randn(outputs, generator=g) if rows != 33 else None
        activation = ("silu_gate", "gelu_tanh", "quick_gelu")[at % 3]
        residual = torch.randn(rows, _width(outputs, activation), generator=g) if at % 2 == 0 else None
        label = f"{rows} rows of {columns} to {outputs}"
        yield Sample((x, weight, None, bias, "none", None), label, differentiable=False)
        yield Sample((x, weight, None, bias, activation, residual), f"{label}, {activation}", differentiable=False)
        values = torch.randint(-127, 128, (outputs, columns), generator=g, dtype=torch.int8)
        scale = torch.rand(outputs, generator=g) / 127
        yield Sample((x, values, scale, bias, "none", None), f"{label}, int8", differentiable=False, kept=(2,))


@define_op(
    module="prefill_linear",
    check=_check,
    fake=lambda x, weight, *rest: x.new_empty((x.shape[0], _width(weight.shape[0], rest[2]))),
    cpp=_cpp_forward,
    cpp_supports=_cpp.runs(torch.float32, torch.bfloat16),
    samples=_samples,
)
def prefill_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Tensor:
    """[N, O] of x's dtype, or [N, O / 2] behind a gate; residual has that shape.

    x: [N, K] float. weight: [O, K] of x's dtype, or int8 with scale [O] float32. bias: [O]. activation: of ACTIVATIONS.
    """
    y = ACTIVATIONS[activation](reference_product(x, weight, scale, bias))
    return y if residual is None else residual + y
