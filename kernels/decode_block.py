"""Triton kernels of ops/decode_block.py: what stands between the products of a decoder layer, in one pass.

Their arithmetic is the reference's, rounded where it rounds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyllava_fast.kernels._common import LAUNCH, TRITON_TYPES, CompileCase

WARPS = 4
BLOCK = 1024
"""Outputs of a program of the gate."""


@triton.jit
def norm_row(x, weight, y, eps, width, x_row, BLOCK: tl.constexpr):
    """One row; the whole of it is in registers."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    kind: tl.constexpr = y.dtype.element_ty
    factor = tl.load(weight + at, mask=inside, other=0.0)
    normed = (value * scale).to(kind)
    tl.store(y + row * width + at, (factor.to(tl.float32) * normed.to(tl.float32)).to(kind), mask=inside)


@triton.jit
def rotate_row(x, cosine, sine, y, x_row, HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_H: tl.constexpr,
               BLOCK_D: tl.constexpr):  # fmt: skip
    """BLOCK_H heads of one token; a half of each head is turned against the other."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    half: tl.constexpr = SIZE // 2
    d = tl.arange(0, BLOCK_D)
    inside = (head < HEADS)[:, None] & (d < half)[None, :]
    at = head[:, None] * SIZE + d[None, :]
    first = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + row * x_row + at + half, mask=inside, other=0.0).to(tl.float32)
    cos1 = tl.load(cosine + row * SIZE + d, mask=d < half, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cosine + row * SIZE + half + d, mask=d < half, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sine + row * SIZE + d, mask=d < half, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sine + row * SIZE + half + d, mask=d < half, other=0.0).to(tl.float32)[None, :]
    kind: tl.constexpr = y.dtype.element_ty
    to = y + row * (HEADS * SIZE) + at
    tl.store(to, (first * cos1 - second * sin1).to(kind), mask=inside)
    tl.store(to + half, (second * cos2 + first * sin2).to(kind), mask=inside)


@triton.jit
def gate_row(x, y, width, x_row, BLOCK: tl.constexpr):
    """BLOCK outputs of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_row + width + at, mask=inside, other=0.0).to(tl.float32)
    kind: tl.constexpr = y.dtype.element_ty
    turned = (gate / (1.0 + tl.exp(-gate))).to(kind)
    tl.store(y + row * width + at, (turned.to(tl.float32) * up).to(kind), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[T, D]; see ops/decode_block.py."""
    x, y = _unit(x), x.new_empty(x.shape)
    if y.numel():
        with torch.cuda.device_of(x):
            norm_row[(len(x),)](
                *(x, weight.contiguous(), y, eps, x.shape[1], x.stride(0)),
                BLOCK=triton.next_power_of_2(x.shape[1]),
                num_warps=WARPS,
                **LAUNCH,
            )
    return y


def rotate(x: Tensor, heads: int, cosine: Tensor, sine: Tensor) -> Tensor:
    """[T, heads, Dh]; see ops/decode_block.py."""
    size = x.shape[2]
    if x.stride(2) != 1 or x.stride(1) != size:
        x = x.contiguous()
    y = x.new_empty((len(x), heads, size))
    if y.numel():
        fixed = _turning(heads, size)
        with torch.cuda.device_of(x):
            rotate_row[len(x), triton.cdiv(heads, fixed["BLOCK_H"])](
                x, cosine.contiguous(), sine.contiguous(), y, x.stride(0), **fixed, num_warps=WARPS, **LAUNCH
            )
    return y


def _turning(heads: int, size: int) -> dict[str, int]:
    return {"HEADS": heads, "SIZE": size, "BLOCK_H": 8, "BLOCK_D": triton.next_power_of_2(size // 2)}


def silu_gate(x: Tensor) -> Tensor:
    """[T, F]; see ops/decode_block.py."""
    x, y = _unit(x), x.new_empty((len(x), x.shape[1] // 2))
    if y.numel():
        with torch.cuda.device_of(x):
            gate_row[len(x), triton.cdiv(y.shape[1], BLOCK)](
                x, y, y.shape[1], x.stride(0), BLOCK=BLOCK, num_warps=WARPS, **LAUNCH
            )
    return y


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def compile_cases() -> Iterator[CompileCase]:
    """TinyLlama's layer in every dtype."""
    for kind in TRITON_TYPES.values():
        like = {"x": f"*{kind}", "y": f"*{kind}", "width": "i32:16", "x_row": "i32:16"}
        norm = {**like, "weight": f"*{kind}", "eps": "fp32"}
        yield CompileCase("norm_row", f"D=2048 {kind}", norm_row, norm, {"BLOCK": 2048}, WARPS, 3, False)
        turn = {"x": f"*{kind}", "cosine": f"*{kind}", "sine": f"*{kind}", "y": f"*{kind}", "x_row": "i32:16"}
        yield CompileCase("rotate_row", f"36 x 64 {kind}", rotate_row, turn, _turning(36, 64), WARPS, 3, False)
        yield CompileCase("gate_row", f"F=5632 {kind}", gate_row, like, {"BLOCK": BLOCK}, WARPS, 3, False)
