"""Linear layers of token-by-token decoding: a few rows of x, so that reading the weight is all the time it takes.

    y = x Wᵀ + bias                    W dense in x's dtype
    y = (x Qᵀ) scale + bias            W = Q scale, Q int8, one float32 scale an output

Sums are float32. The C++ kernel reads the weight once, in its stock [O, K] layout, for all rows of x at once; from
memory in huge pages (``in_huge_pages``) it runs at the speed of memory. On AMX tiles the weight is the left operand,
and bfloat16 x next to int8 weights enters as a 16-bit fixed point under the largest value of its row.
Inference only: there is no backward. Legend: N rows of x, K inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._check import FLOATS, expect
from tinyllava_fast.ops._op import Sample, define_op
from tinyllava_fast.ops._policy import most_rows
from tinyllava_fast.ops.prefill_linear import check_product, reference_product


class Int8(NamedTuple):
    """A weight [O, K] in eight bits, one symmetric scale for each output."""

    values: Tensor  # [O, K] int8, -127..127
    scale: Tensor  # [O] float32


def quantize_int8(weight: Tensor) -> Int8:
    """The weight [O, K], any float, rounded to the nearest of 255 steps of each row's largest magnitude."""
    expect("decode_linear", "weight", weight, "O K", FLOATS)
    exact = weight.detach().float()
    scale = exact.abs().amax(1) / 127 if exact.shape[1] else exact.new_zeros(len(exact))
    steps = exact / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return Int8(steps.round().clamp(-127, 127).to(torch.int8), scale)


def dequantize_int8(values: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The whole weight [O, K] in dtype: one float32 product, then rounded."""
    return (values.float() * scale[:, None]).to(dtype)


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy of a CPU tensor in memory that is read half again as fast (28-34 against 20-25 GB/s on a 2-core Xeon)."""
    copy = _cpp.empty(*tensor.shape, dtype=tensor.dtype) if tensor.is_cpu else torch.empty_like(tensor)
    return copy.copy_(tensor)


def policy_name(int8: bool) -> str:
    """Return the op's name in _policy.TABLE; a GEMM would have to dequantize int8 weights first."""
    return "decode_linear int8" if int8 else "decode_linear"


def _check(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
    check_product("decode_linear", x, weight, scale, bias)
    most = most_rows(policy_name(scale is not None))
    if x.shape[0] > most:
        raise ValueError(f"decode_linear: {x.shape[0]} rows, the kernel takes at most {most}")


def _cpp_forward(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    x, weight = _cpp.unit_stride(x), weight.contiguous()
    scale = None if scale is None else scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows, outputs, columns = x.shape[0], weight.shape[0], weight.shape[1]
    y = torch.empty(rows, outputs, dtype=x.dtype)
    scratch = _cpp.row_scratch(columns)
    _cpp.extension().decode_linear(
        *(x.data_ptr(), x.stride(0), weight.data_ptr()),
        *(0 if t is None else t.data_ptr() for t in (scale, bias)),
        *(scratch.data_ptr(), y.data_ptr(), rows, outputs, columns, _cpp.DTYPE_CODES[x.dtype]),
    )
    return y


def _samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)
    shapes = ((64, 128), (37, 100), (16, 33), (5, 7), (1, 1), (130, 576))
    for rows, (outputs, columns) in zip((1, 2, 3, 5, 9, 16), shapes, strict=True):
        weight = torch.randn(outputs, columns, generator=g)
        x = torch.randn(columns, rows, generator=g).t() if rows % 2 else torch.randn(rows, columns, generator=g)
        bias = torch.randn(outputs, generator=g) if rows != 2 else None
        label = f"{rows} rows of {columns} to {outputs}"
        yield Sample((x, weight, None, bias), label, differentiable=False)
        yield Sample((x, *quantize_int8(weight), bias), f"{label}, int8", differentiable=False, kept=(2,))
    for rows, outputs, columns in ((0, 4, 8), (3, 0, 8), (3, 4, 0)):
        x, weight = torch.randn(rows, columns, generator=g), torch.randn(outputs, columns, generator=g)
        yield Sample((x, weight, None, None), f"empty {rows} {outputs} {columns}", differentiable=False)


@define_op(
    module="decode_linear",
    check=_check,
    fake=lambda x, weight, scale, bias: x.new_empty((x.shape[0], weight.shape[0])),
    cpp=_cpp_forward,
    cpp_supports=_cpp.runs(torch.float32, torch.bfloat16),
    triton_supports=lambda x, weight, scale, bias: "it takes int8 weights" if scale is None else None,
    samples=_samples,
)
def decode_linear_fwd(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """[N, O]; x Wᵀ + bias. N is at most what _policy.TABLE says."""
    return reference_product(x, weight, scale, bias)
