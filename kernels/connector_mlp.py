"""connector_mlp on a GPU: the work between its products is done where their tiles are made.

Forward, the first product's tiles leave as h = x W1ᵀ + b1 and as f(h); the second product is cuBLAS's. Backward, the
tiles of dy W2 leave as dh = (dy W2) f'(h), beside a = f(h), and cuBLAS multiplies what is left.
Legend: N rows, K inputs, D hidden, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyllava_fast.kernels._attention import add_product
from tinyllava_fast.kernels._common import TRITON_TYPES, CompileCase
from tinyllava_fast.kernels._products import tile_of, tiles
from tinyllava_fast.ops.connector_mlp import Gradients, fake_bwd

KINDS = ("gelu", "gelu_tanh", "relu", "silu")
HALF = {"forward": (128, 128, 32, 8, 4), "backward": (128, 64, 32, 8, 4)}
FLOAT = {"forward": (64, 64, 16, 8, 3), "backward": (64, 32, 16, 8, 3)}
"""Rows, columns and depth of a tile, warps, stages."""


@triton.jit
def value_and_slope(x, KIND: tl.constexpr):
    """f(x) and f'(x) in float32. KIND: place in KINDS."""
    if KIND == 0:
        phi = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * phi
        slope = phi + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == 1:
        s = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        value = x * s
        slope = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif KIND == 2:
        value = tl.where(x > 0, x, x * 0.0)
        slope = tl.where(x > 0, 1.0, 0.0)
    else:
        s = tl.sigmoid(x)
        value = x * s
        slope = s * (1.0 + x * (1.0 - s))
    return value, slope


@triton.jit
def product(left, right, row, column, rows, columns, depth, DOWN: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A tile of left right. left: [rows, depth], contiguous. right: [depth, columns], of which neighbours in depth are
    adjacent in memory where DOWN (it is a contiguous matrix's transpose), else neighbours in columns."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        a = tl.load(
            left + row.to(tl.int64)[:, None] * depth + at[None, :],
            mask=(row < rows)[:, None] & (at < depth)[None, :], other=0.0,
        )  # fmt: skip
        if DOWN:
            where = column.to(tl.int64)[None, :] * depth + at[:, None]
        else:
            where = at.to(tl.int64)[:, None] * columns + column[None, :]
        b = tl.load(right + where, mask=(at < depth)[:, None] & (column < columns)[None, :], other=0.0)
        acc = add_product(a, b, acc, PRECISION)
    return acc


@triton.jit
def hidden_tiles(
    x, w1, b1, h, a, n, k, d, KIND: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h [N, D] = x W1ᵀ + b1 and a [N, D] = f(h)."""
    i, j = tile_of(n, d, BLOCK_M, BLOCK_N)
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    column = j * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = product(x, w1, row, column, n, d, k, True, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    if BIAS:
        sums += tl.load(b1 + column, mask=column < d, other=0.0).to(tl.float32)[None, :]
    value, _ = value_and_slope(sums, KIND)
    inside = (row < n)[:, None] & (column < d)[None, :]
    at = row.to(tl.int64)[:, None] * d + column[None, :]
    tl.store(h + at, sums.to(h.dtype.element_ty), mask=inside)
    tl.store(a + at, value.to(a.dtype.element_ty), mask=inside)


@triton.jit
def gradient_tiles(
    grad, w2, h, a, dh, n, d, o, KIND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a [N, D] = f(h) and dh [N, D] = (grad W2) f'(h)."""
    i, j = tile_of(n, d, BLOCK_M, BLOCK_N)
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    column = j * BLOCK_N + tl.arange(0, BLOCK_N)
    da = product(grad, w2, row, column, n, d, o, False, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    inside = (row < n)[:, None] & (column < d)[None, :]
    at = row.to(tl.int64)[:, None] * d + column[None, :]
    value, slope = value_and_slope(tl.load(h + at, mask=inside, other=0.0).to(tl.float32), KIND)
    tl.store(a + at, value.to(a.dtype.element_ty), mask=inside)
    tl.store(dh + at, (da * slope).to(dh.dtype.element_ty), mask=inside)


def _settings(direction: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    shape = (FLOAT if dtype == torch.float32 else HALF)[direction]
    return tiles(*shape, device=device, dtype=dtype)


def connector_mlp_fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """y [N, O] and h [N, D]; see ops/connector_mlp.py."""
    n, k, d = len(x), x.shape[1], len(w1)
    h, a = x.new_empty((n, d)), x.new_empty((n, d))
    options = _settings("forward", x.dtype, x.device.type)
    grid = (triton.cdiv(n, options["BLOCK_M"]) * triton.cdiv(d, options["BLOCK_N"]),)
    if h.numel():
        with torch.cuda.device_of(x):
            hidden_tiles[grid](
                x.contiguous(), w1.contiguous(), b1, h, a, n, k, d, KIND=KINDS.index(activation), BIAS=b1 is not None,
                **options,
            )  # fmt: skip
    return torch.nn.functional.linear(a, w2, b2), h


def connector_mlp_bwd(
    grad: Tensor, x: Tensor, h: Tensor, w1: Tensor, w2: Tensor, activation: str, want: list[bool]
) -> Gradients:
    """Gradients of x, w1, b1, w2 and b2; the unwanted have no rows."""
    n, d, o = len(x), len(w1), len(w2)
    made = list(fake_bwd(grad, x, h, w1, w2, activation, want))
    if any(want[:4]):
        a, dh = x.new_empty((n, d)), x.new_empty((n, d))
        options = _settings("backward", x.dtype, x.device.type)
        grid = (triton.cdiv(n, options["BLOCK_M"]) * triton.cdiv(d, options["BLOCK_N"]),)
        if a.numel():
            with torch.cuda.device_of(x):
                gradient_tiles[grid](
                    grad.contiguous(), w2.contiguous(), h.contiguous(), a, dh, n, d, o, KIND=KINDS.index(activation),
                    **options,
                )  # fmt: skip
        if want[0]:
            made[0] = dh @ w1
        if want[1]:
            made[1] = dh.t() @ x
        if want[2]:
            made[2] = dh.sum(0)
        if want[3]:
            made[3] = grad.t() @ a
    if want[4]:
        made[4] = grad.sum(0)
    return made[0], made[1], made[2], made[3], made[4]


def compile_cases() -> Iterator[CompileCase]:
    """SigLIP-so400m (1152) to the widths of TinyLlama, Gemma-2B and Phi-2; every activation, and float32."""
    launches = [
        ("TinyLlama", 2048, torch.bfloat16, "gelu"),
        ("Phi-2", 2560, torch.bfloat16, "gelu"),
        ("Gemma-2B", 2048, torch.float16, "gelu_tanh"),
        ("TinyLlama", 2048, torch.bfloat16, "relu"),
        ("TinyLlama", 2048, torch.bfloat16, "silu"),
        ("TinyLlama", 2048, torch.float32, "gelu"),
    ]
    for model, width, dtype, activation in launches:
        kind, half = TRITON_TYPES[dtype], dtype != torch.float32
        label = f"SigLIP-so400m to {model}, {width}, {activation}, {kind}"
        for direction, kernel, names, sizes, bias in (
            ("forward", hidden_tiles, ("x", "w1", "b1", "h", "a"), ("k", "d"), {"BIAS": True}),
            ("backward", gradient_tiles, ("grad", "w2", "h", "a", "dh"), ("d", "o"), {}),
        ):
            options = _settings(direction, dtype, "cuda")
            signature = {name: f"*{kind}" for name in names} | {"n": "i32"} | {size: "i32:16" for size in sizes}
            constants = {k: v for k, v in options.items() if k.isupper()}
            constants |= {"KIND": KINDS.index(activation), **bias}
            yield CompileCase(
                kernel.fn.__name__,
                label,
                kernel,
                signature,
                constants,
                options["num_warps"],
                options["num_stages"],
                half,
            )
