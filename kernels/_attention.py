"""Device functions of packed attention, forward and backward: which rows, which keys, their scores.

A program of fwd and of dq owns BLOCK_M rows of one segment and one key head. Rows are (query, query head) pairs: row r
of a segment is its query r // GROUP under head r % GROUP of the group, so the query heads that share keys share loads.
The keys of a segment are one axis: `ahead` prefix keys, then its own. Every row sees one interval of that axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from tinyllava_fast.kernels._common import TRITON_TYPES, CompileCase, Launch


@triton.jit
def find_rows(block, cu_q, segments, tokens, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(segment, first query, number of queries, first row) of a block; segments -1 and S are what lies outside.

    Segment s, counted from 0 for the rows ahead of cu_q[0] to S + 1 for those behind cu_q[S], begins at block
    begin(s) * GROUP // BLOCK_M + s. That leaves each one room for ceil(rows / BLOCK_M) blocks, so the map from blocks
    to segments is a bisection of cu_q: no table, no synchronization.
    """
    low = block * 0
    high = segments + 1
    while low < high:
        middle = (low + high + 1) // 2
        begins = tl.load(cu_q + middle - 1) * GROUP // BLOCK_M + middle
        low = tl.where(begins <= block, middle, low)
        high = tl.where(begins <= block, high, middle - 1)
    begin = tl.load(cu_q + low - 1, mask=low > 0, other=0)
    end = tl.load(cu_q + low, mask=low <= segments, other=tokens)
    return low - 1, begin, end - begin, (block - (begin * GROUP // BLOCK_M + low)) * BLOCK_M


@triton.jit
def find_keys(s, live, cu_k, prefix, used, PREFIX: tl.constexpr, USED: tl.constexpr):
    """(first own key, number of them, first prefix key, number of them) of segments s; zeros where not live."""
    first = tl.load(cu_k + s, mask=live, other=0)
    if USED:
        count = tl.load(used + s, mask=live, other=0)
    else:
        count = tl.load(cu_k + s + 1, mask=live, other=0) - first
    if PREFIX:
        before = tl.load(prefix + 2 * s, mask=live, other=0)
        ahead = tl.load(prefix + 2 * s + 1, mask=live, other=0)
    else:
        before = first * 0
        ahead = first * 0
    return first, count, before, ahead


@triton.jit
def interval(i, queries, count, ahead, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """[low, high) of the segment's key axis that query i sees; the last query stands on the last key."""
    low = i * 0
    high = low + ahead + count
    if CAUSAL:
        high = ahead + tl.minimum(tl.maximum(i + count - queries + 1, 0), count)
    if WINDOW:
        low = tl.maximum(i + count - queries + 1 - window, 0)
    return low, high


@triton.jit
def full_blocks(low0, low1, high0, BLOCK_N: tl.constexpr):
    """[begin, end) of the whole blocks, counted from low0, in which every row sees every key.

    low0, low1: smallest and largest low of the rows; high0: smallest high.
    """
    begin = low0 + tl.cdiv(low1 - low0, BLOCK_N) * BLOCK_N
    return begin, begin + tl.maximum(high0 - begin, 0) // BLOCK_N * BLOCK_N


@triton.jit
def load_rows(base, rows, inside, stride, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK_D]: zeros past SIZE columns and, if MASKED, in rows that are not inside."""
    d = tl.arange(0, BLOCK_D)
    at = base + rows.to(tl.int64)[:, None] * stride + d[None, :]
    if MASKED:
        tile = tl.load(at, mask=inside[:, None] & (d < SIZE)[None, :], other=0.0)
    elif SIZE != BLOCK_D:
        tile = tl.load(at, mask=(d < SIZE)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def key_rows(j, first, before, ahead, PREFIX: tl.constexpr):
    """Rows of k and v of the keys j of the segment's axis."""
    if PREFIX:
        rows = tl.where(j < ahead, before + j, first - ahead + j)
    else:
        rows = first + j
    return rows


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """The float32 product of two tiles. "widened" is for the interpreter, which multiplies the bits of bfloat16."""
    if PRECISION == "widened":
        tile = tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        tile = tl.dot(a, b, input_precision=PRECISION)
    return tile


@triton.jit
def add_product(a, b, acc, PRECISION: tl.constexpr):
    """acc + product(a, b)."""
    if PRECISION == "widened":
        tile = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        tile = tl.dot(a, b, acc, input_precision=PRECISION)
    return tile


@triton.jit
def tanh(x):
    """From exp2, which the interpreter has too; near zero, where 1 - exp cancels, from the series."""
    square = x * x
    series = x * (1 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315))))
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)  # exp(-2 |x|)
    large = (1 - e) / (1 + e)
    return tl.where(square < 0.0225, series, tl.where(x < 0, -large, large))


@triton.jit
def exponents(s, scale, softcap, SOFTCAP: tl.constexpr):
    """(x, factor, slope): scores in units of log 2 are x * factor; slope is d x / d s up to the scale."""
    log2e: tl.constexpr = 1.4426950408889634
    if SOFTCAP:
        x = tanh(s * (scale / softcap))
        factor = softcap * log2e
        slope = 1 - x * x
    else:
        x = s
        factor = scale * log2e
        slope = 1.0
    return x, factor, slope


@triton.jit
def fold(
    acc, total, peak, q, k, v, j0, j1, low, high, end, first, before, ahead, k_row, v_row, scale, softcap,
    SIZE: tl.constexpr, SOFTCAP: tl.constexpr, PREFIX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys [j0, j1) into the running (weighted sum of values, sum of weights, largest exponent)."""
    for start in tl.range(j0, j1, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        rows = key_rows(j, first, before, ahead, PREFIX)
        keys = load_rows(k, rows, j < end, k_row, SIZE, BLOCK_D, MASKED)
        s = product(q, tl.trans(keys), PRECISION)
        x, factor, _ = exponents(s, scale, softcap, SOFTCAP)
        if MASKED:
            x = tl.where((j[None, :] >= low[:, None]) & (j[None, :] < high[:, None]), x, -float("inf"))
        largest = tl.maximum(peak, tl.max(x, 1) * factor)
        shift = largest
        if MASKED:  # a row that has seen nothing yet: exp2(-inf - 0) = 0 instead of exp2(-inf + inf) = nan
            shift = tl.where(largest == -float("inf"), 0.0, largest)
        p = tl.exp2(x * factor - shift[:, None])
        keep = tl.exp2(peak - shift)
        values = load_rows(v, rows, j < end, v_row, SIZE, BLOCK_D, MASKED)
        acc = add_product(p.to(values.dtype), values, acc * keep[:, None], PRECISION)
        total = total * keep + tl.sum(p, 1)
        peak = largest
    return acc, total, peak


def index(cu_q: Tensor, cu_k: Tensor | None, prefix: Tensor | None, used: Tensor | None) -> tuple[Tensor, ...]:
    """cu_q, cu_k, prefix and used as dense pointers; what is not given is never read and stands for itself as cu_q."""
    return tuple(cu_q.contiguous() if t is None else t.contiguous() for t in (cu_q, cu_k, prefix, used))


def constants(
    size: int,
    group: int,
    causal: bool,
    window: int,
    softcap: float,
    prefix: Tensor | None,
    used: Tensor | None,
    dtype: torch.dtype,
    device: str,
) -> dict[str, int | str]:
    """Return the compile-time arguments that all three kernels take, apart from their blocks."""
    precision = "ieee"
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        precision = "tf32"
    if dtype == torch.bfloat16 and device == "cpu":
        precision = "widened"
    return {
        "GROUP": group,
        "SIZE": size,
        "CAUSAL": causal,
        "WINDOW": window > 0,
        "SOFTCAP": softcap > 0,
        "PREFIX": prefix is not None,
        "USED": used is not None,
        "BLOCK_D": max(16, triton.next_power_of_2(size)),
        "PRECISION": precision,
    }


@dataclass(frozen=True)
class Shape:
    """A model's attention, for the offline compilation."""

    name: str
    heads: int
    kv_heads: int
    size: int
    causal: bool = True
    dtype: torch.dtype = torch.bfloat16
    softcap: float = 0.0
    window: int = 0

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        return f"{self.name} {self.heads}/{self.kv_heads} x {self.size} {kind} {TRITON_TYPES[self.dtype]}"


# float32 with heads of 256 is not here: whatever the blocks, ptxas spills in the dq pass (docs/LOG.md)
SHAPES = (
    Shape("TinyLlama", 32, 4, 64),
    Shape("Phi-2", 32, 32, 80),
    Shape("Gemma-2B", 8, 1, 256),
    Shape("SigLIP-so400m", 16, 16, 72, causal=False),
    Shape("Qwen2-0.5B, windowed", 14, 2, 64, window=1024),
    Shape("Gemma-2-2B, capped", 8, 4, 256, softcap=50.0, dtype=torch.float16),
    Shape("Phi-3-mini", 32, 32, 96),
    Shape("Qwen2-7B", 28, 4, 128),
    Shape("TinyLlama", 32, 4, 64, dtype=torch.float32),
    Shape("Qwen2-7B", 28, 4, 128, dtype=torch.float32),
)


def compile_case(kernel: JITFunction, name: str, shape: Shape, launch: Launch, **more: int) -> CompileCase:
    """Return one of the three kernels at a model's shape. more: its own constants and the presence of index tensors.

    Products of float32 are exact by default and then not for tensor cores.
    """
    group, window, cap = shape.heads // shape.kv_heads, shape.window, shape.softcap
    given = constants(shape.size, group, shape.causal, window, cap, None, None, shape.dtype, "cuda")
    constexprs = {**given, **launch.blocks(), **more}
    kind = TRITON_TYPES[shape.dtype]
    fixed = {"scale": "fp32", "softcap": "fp32", "segments": "i32", "tokens": "i32", "keys": "i32", "window": "i32"}
    fixed |= dict.fromkeys(("cu_q", "cu_k", "prefix", "used"), "*i32")
    fixed |= dict.fromkeys(("lse", "delta", "dlse"), "*fp32")
    fixed |= dict.fromkeys(("dout", "q", "k", "v", "out", "dq"), f"*{kind}")
    fixed |= dict.fromkeys(("dk", "dv"), "*fp32" if more.get("SPLITS", 1) > 1 else f"*{kind}")
    types = {a: fixed.get(a, "i32:16") for a in kernel.arg_names if a not in constexprs}
    has_dot = shape.dtype != torch.float32
    return CompileCase(name, str(shape), kernel, types, constexprs, launch.warps, launch.stages, has_dot)
