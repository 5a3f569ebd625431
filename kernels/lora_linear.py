"""lora_linear on a GPU: the adapter's share is added where the tiles of the layer's own product are made.

    u = (m x) Aᵀ        one program a block of rows, x masked in registers
    y                   a tile of x Wᵀ goes on with the rank as further depth: + s u Bᵀ, + bias, written once
    dx                  dy W is cuBLAS's; + m (v A), in place, the mask made where the tile is
    dA, dB, dW          cuBLAS's; with dropout, dA multiplies a masked copy of x

The mask is the hash of ops/lora_linear.py. An NF4 weight is unpacked first (kernels/nf4.py).
Legend: N rows, K inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from tinyllava_fast.kernels._attention import add_product
from tinyllava_fast.kernels._common import LAUNCH, TRITON_TYPES, CompileCase
from tinyllava_fast.kernels._products import tile_of, tiles
from tinyllava_fast.kernels.nf4 import dequantize_nf4
from tinyllava_fast.ops.lora_linear import Backward, Forward, Gradients, dropout_threshold, empty_gradients, stored_nf4

HALF = {"down": (64, 64, 64, 4, 3), "up": (128, 128, 32, 8, 4), "add": (128, 64, 32, 8, 3)}
FLOAT = {"down": (32, 32, 32, 4, 2), "up": (64, 64, 16, 8, 3), "add": (64, 32, 16, 8, 3)}
"""Rows, columns and depth of a tile, warps, stages."""
COPIED = 1024  # columns of a row that a program of the masked copy takes


@triton.jit
def mix(h):
    """A bijection of 32-bit numbers."""
    h = (h ^ (h >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    h = (h ^ (h >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return h ^ (h >> 16)


@triton.jit
def kept(seed, row, column, LEAST: tl.constexpr):
    """[rows, columns] bool: which elements of x stay. seed: pointer to an int64."""
    number = tl.load(seed)
    low = (number & 0xFFFFFFFF).to(tl.uint32)
    high = ((number >> 32) & 0xFFFFFFFF).to(tl.uint32)
    first = mix(row.to(tl.uint32) ^ low)
    second = mix(first + high + tl.full((), 0x9E3779B9, tl.uint32))
    h = column.to(tl.uint32)[None, :] ^ first[:, None]
    h = (h ^ (h >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    h = ((h ^ (h >> 15)) + second[:, None]) * tl.full((), 0x846CA68B, tl.uint32)
    return (h ^ (h >> 16)).to(tl.int64) >= LEAST


@triton.jit
def load_tile(matrix, row, column, rows, columns):
    """A tile of a contiguous [rows, columns] matrix, zeros beyond."""
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    return tl.load(matrix + at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def down_tiles(
    x, a, u, seed, n, k, r, LEAST: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u [N, R] = (m x) Aᵀ."""
    i, j = tile_of(n, r, BLOCK_M, BLOCK_N)
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    column = j * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        part = load_tile(x, row, depth, n, k)
        if MASKED:
            part = tl.where(kept(seed, row, depth, LEAST), part, 0.0).to(part.dtype)
        acc = add_product(part, tl.trans(load_tile(a, column, depth, r, k)), acc, PRECISION)
    inside = (row < n)[:, None] & (column < r)[None, :]
    tl.store(u + row.to(tl.int64)[:, None] * r + column[None, :], acc.to(u.dtype.element_ty), mask=inside)


@triton.jit
def up_tiles(
    x, w, u, b, bias, y, scale, n, k, o, r, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [N, O] = x Wᵀ + bias + scale u Bᵀ."""
    i, j = tile_of(n, o, BLOCK_M, BLOCK_N)
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    column = j * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, r, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        acc = add_product(
            load_tile(u, row, depth, n, r), tl.trans(load_tile(b, column, depth, o, r)), acc, PRECISION
        )  # fmt: skip
    acc *= scale
    for start in range(0, k, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        acc = add_product(
            load_tile(x, row, depth, n, k), tl.trans(load_tile(w, column, depth, o, k)), acc, PRECISION
        )  # fmt: skip
    if BIAS:
        acc += tl.load(bias + column, mask=column < o, other=0.0).to(tl.float32)[None, :]
    inside = (row < n)[:, None] & (column < o)[None, :]
    tl.store(y + row.to(tl.int64)[:, None] * o + column[None, :], acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def add_tiles(
    dx, v, a, seed, n, k, r, LEAST: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [N, K] += m (v A), in place."""
    i, j = tile_of(n, k, BLOCK_M, BLOCK_N)
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    column = j * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, r, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        acc = add_product(load_tile(v, row, depth, n, r), load_tile(a, depth, column, r, k), acc, PRECISION)
    if MASKED:
        acc = tl.where(kept(seed, row, column, LEAST), acc, 0.0)
    total = acc + load_tile(dx, row, column, n, k).to(tl.float32)
    inside = (row < n)[:, None] & (column < k)[None, :]
    tl.store(dx + row.to(tl.int64)[:, None] * k + column[None, :], total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def masked_rows(x, out, seed, k, LEAST: tl.constexpr, BLOCK: tl.constexpr):
    """out = m x, a stretch of a row a program."""
    row = tl.program_id(0) + tl.arange(0, 1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * k + column[None, :]
    inside = (column < k)[None, :]
    value = tl.load(x + at, mask=inside, other=0.0)
    tl.store(out + at, tl.where(kept(seed, row, column, LEAST), value, 0.0).to(out.dtype.element_ty), mask=inside)


def _settings(kernel: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    shape = (FLOAT if dtype == torch.float32 else HALF)[kernel]
    return tiles(*shape, device=device, dtype=dtype)


def _launch(
    kernel: JITFunction, which: str, rows: int, columns: int, like: Tensor, *args: object, **constants: object
) -> None:
    options = _settings(which, like.dtype, like.device.type)
    grid = (triton.cdiv(rows, options["BLOCK_M"]) * triton.cdiv(columns, options["BLOCK_N"]),)
    if grid[0]:
        with torch.cuda.device_of(like):
            kernel[grid](*args, **constants, **options)


def _mask(p: float, seed: Tensor | None) -> dict[str, int]:
    return {"LEAST": dropout_threshold(p), "MASKED": seed is not None and p > 0}


def _weight(given: Forward | Backward) -> Tensor:
    if given.weight is not None:
        return given.weight.contiguous()
    held = stored_nf4(given)
    return dequantize_nf4(held.packed, held.absmax, *held.shape, held.blocksize, given.x.dtype)


def lora_linear_fwd(*args: object) -> tuple[Tensor, Tensor]:
    """(y [N, O], u [N, R]); see ops/lora_linear.py."""
    given = Forward._make(args)
    x, a, b, bias, seed = given.x.contiguous(), given.a.contiguous(), given.b.contiguous(), given.bias, given.seed
    (n, k), (o, r) = x.shape, b.shape
    u, y = x.new_empty((n, r)), x.new_empty((n, o))
    _launch(down_tiles, "down", n, r, x, x, a, u, seed, n, k, r, **_mask(given.p, seed))
    arguments = (x, _weight(given), u, b, bias, y, given.scale / (1 - given.p), n, k, o, r)
    _launch(up_tiles, "up", n, o, x, *arguments, BIAS=bias is not None)
    return y, u


def lora_linear_bwd(*args: object) -> Gradients:
    """Gradients of x, weight, bias, a and b; the unwanted have no rows."""
    given = Backward._make(args)
    grad, x, a, b, u, seed, want = given.grad, given.x, given.a, given.b, given.u, given.seed, given.want
    (n, k), r, factor = x.shape, len(a), given.scale / (1 - given.p)
    made, mask = list(empty_gradients(given)), _mask(given.p, seed)
    if want[0] or want[3]:
        v = torch.addmm(grad.new_empty(()), grad, b, beta=0, alpha=factor)
    if want[0]:
        made[0] = grad @ _weight(given)
        _launch(add_tiles, "add", n, k, x, made[0], v, a.contiguous(), seed, n, k, r, **mask)
    if want[1]:
        made[1] = grad.t() @ x
    if want[2]:
        made[2] = grad.sum(0)
    if want[3]:
        if mask["MASKED"] and x.numel():
            x, whole = torch.empty_like(x, memory_format=torch.contiguous_format), x.contiguous()
            block = COPIED
            with torch.cuda.device_of(x):
                masked_rows[n, triton.cdiv(k, block)](whole, x, seed, k, LEAST=mask["LEAST"], BLOCK=block, **LAUNCH)
        made[3] = v.t() @ x
    if want[4]:
        made[4] = torch.addmm(grad.new_empty(()), grad.t(), u, beta=0, alpha=factor)
    return made[0], made[1], made[2], made[3], made[4]


def compile_cases() -> Iterator[CompileCase]:
    """MLP projections at rank 128, with dropout and without, and float32."""
    for model, dtype, masked in (
        ("TinyLlama", torch.bfloat16, True), ("TinyLlama", torch.bfloat16, False), ("Phi-2", torch.bfloat16, True),
        ("Gemma-2B", torch.float16, True), ("TinyLlama", torch.float32, True),
    ):  # fmt: skip
        kind, sizes = TRITON_TYPES[dtype], {"n": "i32", "k": "i32:16", "o": "i32:16", "r": "i32:16"}
        label = f"{model} R=128 {kind}" + (", dropout" if masked else "")
        mask = {"LEAST": dropout_threshold(0.05), "MASKED": masked}
        for which, kernel, extra in (
            ("down", down_tiles, mask), ("add", add_tiles, mask), ("up", up_tiles, {"BIAS": True}),
        ):  # fmt: skip
            options = _settings(which, dtype, "cuda")
            constants = {key: value for key, value in options.items() if key.isupper()} | extra
            fixed = {**sizes, "seed": "*i64", "scale": "fp32"}
            signature = {name: fixed.get(name, f"*{kind}") for name in kernel.arg_names if name not in constants}
            warps, stages = options["num_warps"], options["num_stages"]
            half = dtype != torch.float32
            yield CompileCase(kernel.fn.__name__, label, kernel, signature, constants, warps, stages, half)
        if masked:
            signature = {"x": f"*{kind}", "out": f"*{kind}", "seed": "*i64", "k": "i32:16"}
            constants = {"LEAST": mask["LEAST"], "BLOCK": COPIED}
            yield CompileCase("masked_rows", label, masked_rows, signature, constants, 4, 3, False)
