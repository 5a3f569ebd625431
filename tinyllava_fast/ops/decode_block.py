"""The operators between the products of a Llama-style decoder layer in inference, one call each.

    rms_norm   y = weight round(x / sqrt(mean x² + eps))            round: to x's dtype, as transformers does
    rotate     (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)       halves of a head (arXiv 2104.09864)
    silu_gate  y = round(silu(gate)) up                             (arXiv 2002.05202)

In torch they are a dozen small operators, which cost a token more time than the arithmetic of its layer. Inference
only: there is no backward. Legend: T tokens, D width, H heads, Dh head size, F inner width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._check import FLOATS, expect
from tinyllava_fast.ops._op import Sample, define_op


def _check_norm(x: Tensor, weight: Tensor, eps: float) -> None:
    expect("decode_block", "x", x, "T D", FLOATS)
    expect("decode_block", "weight", weight, "D", (x.dtype,), like=x)
    if x.shape[1] != weight.shape[0]:
        raise ValueError(f"decode_block: x has {x.shape[1]} columns, the weight has {weight.shape[0]} entries")


def _cpp_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight, y = x.contiguous(), weight.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    pointers = (x.data_ptr(), weight.data_ptr(), eps, y.data_ptr())
    _cpp.extension().rms_norm(*pointers, *x.shape, _cpp.DTYPE_CODES[x.dtype])
    return y


def _samples_norm() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)
    for rows, columns in ((1, 576), (3, 7), (0, 4)):
        x = torch.randn(columns, rows, generator=g).t()
        yield Sample((x, torch.randn(columns, generator=g), 1e-5), f"{rows} x {columns}", differentiable=False)


@define_op(
    module="decode_block",
    check=_check_norm,
    fake=lambda x, weight, eps: x.new_empty(x.shape),
    cpp=_cpp_norm,
    cpp_supports=_cpp.runs(torch.float32, torch.bfloat16),
    samples=_samples_norm,
)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, D], weight [D] of one dtype -> [T, D]."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def _check_rotate(x: Tensor, heads: int, cosine: Tensor, sine: Tensor) -> None:
    expect("decode_block", "x", x, "T H Dh", FLOATS)
    for name, table in (("cosine", cosine), ("sine", sine)):
        expect("decode_block", name, table, "T Dh", (x.dtype,), like=x)
        if table.shape != (x.shape[0], x.shape[2]):
            raise ValueError(f"decode_block: {name} is {list(table.shape)} beside x {list(x.shape)}")
    if not 0 <= heads <= x.shape[1] or x.shape[2] % 2:
        raise ValueError(f"decode_block: {heads} heads of x {list(x.shape)}; the head size must be even")


def _cpp_rotate(x: Tensor, heads: int, cosine: Tensor, sine: Tensor) -> Tensor:
    x, cosine, sine = x.contiguous(), cosine.contiguous(), sine.contiguous()
    rows, every, size = x.shape
    y = torch.empty(rows, heads, size, dtype=x.dtype)
    pointers = (x.data_ptr(), every * size, cosine.data_ptr(), sine.data_ptr(), y.data_ptr())
    _cpp.extension().rotate_heads(*pointers, rows, heads, size, _cpp.DTYPE_CODES[x.dtype])
    return y


def _samples_rotate() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(1)
    for rows, every, heads, size in ((1, 5, 4, 64), (3, 2, 2, 6), (0, 3, 2, 4)):
        angles = torch.randn(rows, size, generator=g)
        args = (torch.randn(rows, every, size, generator=g), heads, angles.cos(), angles.sin())
        yield Sample(args, f"{rows} x {heads} of {every} x {size}", differentiable=False)


@define_op(
    module="decode_block",
    check=_check_rotate,
    fake=lambda x, heads, cosine, sine: x.new_empty((x.shape[0], heads, x.shape[2])),
    cpp=_cpp_rotate,
    cpp_supports=_cpp.runs(torch.float32, torch.bfloat16),
    samples=_samples_rotate,
)
def rotate(x: Tensor, heads: int, cosine: Tensor, sine: Tensor) -> Tensor:
    """The first ``heads`` heads of x [T, H, Dh], rotated: [T, heads, Dh]. cosine, sine: [T, Dh], both halves."""
    kept = x[:, :heads]
    first, second = kept.chunk(2, dim=-1)
    return kept * cosine[:, None] + torch.cat([-second, first], dim=-1) * sine[:, None]


def _check_gate(x: Tensor) -> None:
    expect("decode_block", "x", x, "T 2F", FLOATS)
    if x.shape[1] % 2:
        raise ValueError(f"decode_block: x has {x.shape[1]} columns, expected gate and up side by side")


def _cpp_gate(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype)
    _cpp.extension().silu_gate(x.data_ptr(), y.data_ptr(), *y.shape, _cpp.DTYPE_CODES[x.dtype])
    return y


def _samples_gate() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(2)
    for rows, width in ((1, 1536), (3, 5), (0, 4)):
        x = 6 * torch.randn(rows, 2 * width, generator=g)
        yield Sample((x,), f"{rows} x {width}", differentiable=False)


@define_op(
    module="decode_block",
    check=_check_gate,
    fake=lambda x: x.new_empty((x.shape[0], x.shape[1] // 2)),
    cpp=_cpp_gate,
    cpp_supports=_cpp.runs(torch.float32, torch.bfloat16),
    samples=_samples_gate,
)
def silu_gate(x: Tensor) -> Tensor:
    """x [T, 2F]: gate, then up -> [T, F]."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
