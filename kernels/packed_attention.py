"""Packed attention on a GPU: FlashAttention-2 (arXiv:2307.08691) over segments, keys in one interval a row.

Blocks in which every row sees every key are computed without masks; blocks that no row sees are skipped. The grid is an
upper bound from shapes alone, ceil(rows / BLOCK_M) + S + 2 blocks, so nothing waits for the values of cu_seqlens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyllava_fast.kernels._attention import (
    SHAPES,
    compile_case,
    constants,
    find_keys,
    find_rows,
    fold,
    full_blocks,
    index,
    interval,
)
from tinyllava_fast.kernels._common import CompileCase, Launch, attention_launch
from tinyllava_fast.kernels._packed_attention_bwd import backward_cases, packed_attention_bwd
from tinyllava_fast.ops._attention_args import Args, dense_rows

__all__ = ["compile_cases", "packed_attention_bwd", "packed_attention_fwd"]


@triton.jit
def _attend(
    q, k, v, out, lse, cu_q, cu_k, prefix, used, segments, tokens, scale, softcap, window,
    q_row, q_head, k_row, k_head, v_row, v_head,
    GROUP: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    PREFIX: tl.constexpr, USED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_M rows of a segment and a key head; zeros and -inf outside the segments."""
    head = tl.program_id(1)
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last blocks of a causal segment are the longest: first
    s, begin, queries, row0 = find_rows(block, cu_q, segments, tokens, GROUP, BLOCK_M)
    if row0 >= queries * GROUP:
        return
    first, count, before, ahead = find_keys(s, (s >= 0) & (s < segments), cu_k, prefix, used, PREFIX, USED)
    rows = row0 + tl.arange(0, BLOCK_M)
    inside = rows < queries * GROUP
    i = rows // GROUP
    heads = tl.num_programs(1) * GROUP
    query = begin + i
    part = head * GROUP + rows % GROUP
    low, high = interval(i, queries, count, ahead, window, CAUSAL, WINDOW)
    low0, high0 = interval(row0 // GROUP, queries, count, ahead, window, CAUSAL, WINDOW)
    last = tl.minimum((row0 + BLOCK_M - 1) // GROUP, queries - 1)
    low1, end = interval(last, queries, count, ahead, window, CAUSAL, WINDOW)
    full0, full1 = full_blocks(low0, low1, high0, BLOCK_N)

    d = tl.arange(0, BLOCK_D)
    wanted = inside[:, None] & (d < SIZE)[None, :]
    at = query.to(tl.int64) * q_row + part * q_head
    q_tile = tl.load(q + at[:, None] + d[None, :], mask=wanted, other=0.0)
    k += head.to(tl.int64) * k_head
    v += head.to(tl.int64) * v_head
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    if WINDOW:
        acc, total, peak = fold(
            acc, total, peak, q_tile, k, v, low0, tl.minimum(full0, end), low, high, end, first, before, ahead,
            k_row, v_row, scale, softcap, SIZE, SOFTCAP, PREFIX, BLOCK_N, BLOCK_D, PRECISION, True,
        )  # fmt: skip
    acc, total, peak = fold(
        acc, total, peak, q_tile, k, v, full0, full1, low, high, end, first, before, ahead,
        k_row, v_row, scale, softcap, SIZE, SOFTCAP, PREFIX, BLOCK_N, BLOCK_D, PRECISION, False,
    )  # fmt: skip
    acc, total, peak = fold(
        acc, total, peak, q_tile, k, v, full1, end, low, high, end, first, before, ahead,
        k_row, v_row, scale, softcap, SIZE, SOFTCAP, PREFIX, BLOCK_N, BLOCK_D, PRECISION, True,
    )  # fmt: skip

    ln2: tl.constexpr = 0.6931471805599453
    nothing = total == 0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    to = query.to(tl.int64) * heads + part
    tl.store(out + to[:, None] * SIZE + d[None, :], acc.to(out.dtype.element_ty), mask=wanted)
    logs = tl.where(nothing, -float("inf"), (peak + tl.log2(total)) * ln2)
    tl.store(lse + to, logs, mask=inside)


def packed_attention_fwd(*args: object) -> tuple[Tensor, Tensor]:
    """(out [Tq, H, Dh], lse [Tq, H]); arguments and results as those of the op."""
    q, k, v, cu_q, cu_k, prefix, used, causal, scale, window, softcap = Args._make(args)
    tokens, heads, size = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    group, segments = heads // k.shape[1], cu_q.shape[0] - 1
    launch = _launch(q.device.type, size, q.dtype, tokens * group, segments)
    with torch.cuda.device_of(q):
        _attend[tokens * group // launch.m + segments + 2, k.shape[1]](
            *(q, k, v, out, lse, *index(cu_q, cu_k, prefix, used), segments, tokens, scale, softcap, window),
            *(s for t in (q, k, v) for s in t.stride()[:2]),
            **constants(size, group, causal, window, softcap, prefix, used, q.dtype, q.device.type),
            **launch.options(),
        )
    return out, lse


def _launch(device: str, size: int, dtype: torch.dtype, rows: int, segments: int) -> Launch:
    """The settings of the forward kernel; small blocks where segments have few rows, as in decoding."""
    launch = attention_launch(device, size, dtype)
    return launch["decode" if rows <= 16 * segments else "fwd"]


def compile_cases() -> Iterator[CompileCase]:
    """Every kernel at the shapes of small models."""
    for shape in SHAPES:
        launch = attention_launch("cuda", shape.size, shape.dtype)
        yield compile_case(_attend, "attend", shape, launch["fwd"])
        yield from backward_cases(shape)
    decode = replace(SHAPES[0], name="TinyLlama decoding")
    launch = attention_launch("cuda", decode.size, decode.dtype)
    yield compile_case(_attend, "attend", decode, launch["decode"], PREFIX=True, USED=True)
    yield compile_case(_attend, "attend", replace(decode, name="TinyLlama shared prefix"), launch["fwd"], PREFIX=True)
