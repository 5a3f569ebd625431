"""Backward of packed attention in two passes without atomics, so equal inputs give equal bits.

dq: one program for a block of rows of a segment and a key head, as in the forward pass; it also leaves delta.
dk, dv: one program for a block of rows of k and a key head. It finds every segment that sees one of them, as own key or
in a prefix, and sums over their queries in order: a shared prefix needs nothing more, and rows of k that no segment
sees get their zeros. With few key heads the group's query heads are divided among programs, each writes a float32
partial sum, and torch adds them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyllava_fast.kernels._attention import (
    Shape,
    add_product,
    compile_case,
    constants,
    exponents,
    find_keys,
    find_rows,
    full_blocks,
    index,
    interval,
    key_rows,
    load_rows,
    product,
)
from tinyllava_fast.kernels._common import CompileCase, attention_launch
from tinyllava_fast.ops._attention_args import Args, dense_rows

PROGRAMS = (
    256  # of the dk, dv pass: below this, query heads of a group are divided; two for each unit of an A100 or H100
)
LANES = tl.constexpr(64)  # segments looked at together


@triton.jit
def _fold_dq(
    acc, q, dout, log, delta, k, v, j0, j1, low, high, end, first, before, ahead, k_row, v_row, scale, softcap,
    SIZE: tl.constexpr, SOFTCAP: tl.constexpr, PREFIX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys [j0, j1) into dq / scale."""
    for start in tl.range(j0, j1, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        rows = key_rows(j, first, before, ahead, PREFIX)
        keys = load_rows(k, rows, j < end, k_row, SIZE, BLOCK_D, MASKED)
        values = load_rows(v, rows, j < end, v_row, SIZE, BLOCK_D, MASKED)
        s = product(q, tl.trans(keys), PRECISION)
        dp = product(dout, tl.trans(values), PRECISION)
        x, factor, slope = exponents(s, scale, softcap, SOFTCAP)
        p = tl.exp2(x * factor - log[:, None])
        ds = p * (dp - delta[:, None]) * slope
        if MASKED:
            ds = tl.where((j[None, :] >= low[:, None]) & (j[None, :] < high[:, None]), ds, 0.0)
        acc = add_product(ds.to(keys.dtype), keys, acc, PRECISION)
    return acc


@triton.jit
def _differentiate_queries(
    dout, dlse, q, k, v, out, lse, dq, delta, cu_q, cu_k, prefix, used, segments, tokens, scale, softcap, window,
    q_row, q_head, k_row, k_head, v_row, v_head, d_row, d_head,
    DLSE: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, PREFIX: tl.constexpr, USED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and delta = dout . out - dlse of BLOCK_M rows of a segment and a key head; zeros outside the segments."""
    head = tl.program_id(1)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    s, begin, queries, row0 = find_rows(block, cu_q, segments, tokens, GROUP, BLOCK_M)
    if row0 >= queries * GROUP:
        return
    first, count, before, ahead = find_keys(s, (s >= 0) & (s < segments), cu_k, prefix, used, PREFIX, USED)
    rows = row0 + tl.arange(0, BLOCK_M)
    inside = rows < queries * GROUP
    i = rows // GROUP
    heads = tl.num_programs(1) * GROUP
    query = (begin + i).to(tl.int64)
    part = head * GROUP + rows % GROUP
    low, high = interval(i, queries, count, ahead, window, CAUSAL, WINDOW)
    low0, high0 = interval(row0 // GROUP, queries, count, ahead, window, CAUSAL, WINDOW)
    last = tl.minimum((row0 + BLOCK_M - 1) // GROUP, queries - 1)
    low1, end = interval(last, queries, count, ahead, window, CAUSAL, WINDOW)
    full0, full1 = full_blocks(low0, low1, high0, BLOCK_N)

    d = tl.arange(0, BLOCK_D)
    wanted = inside[:, None] & (d < SIZE)[None, :]
    to = query * heads + part
    d_tile = tl.load(dout + (query * d_row + part * d_head)[:, None] + d[None, :], mask=wanted, other=0.0)
    o_tile = tl.load(out + to[:, None] * SIZE + d[None, :], mask=wanted, other=0.0)
    dots = tl.sum(d_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    if DLSE:
        dots -= tl.load(dlse + to, mask=inside, other=0.0)
    tl.store(delta + to, dots, mask=inside)
    log = tl.load(lse + to, mask=inside, other=0.0)
    log = tl.where(log == -float("inf"), 0.0, log * 1.4426950408889634)  # sees nothing: every key is masked anyway
    q_tile = tl.load(q + (query * q_row + part * q_head)[:, None] + d[None, :], mask=wanted, other=0.0)
    k += head.to(tl.int64) * k_head
    v += head.to(tl.int64) * v_head
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WINDOW:
        acc = _fold_dq(
            acc, q_tile, d_tile, log, dots, k, v, low0, tl.minimum(full0, end), low, high, end, first, before, ahead,
            k_row, v_row, scale, softcap, SIZE, SOFTCAP, PREFIX, BLOCK_N, BLOCK_D, PRECISION, True,
        )  # fmt: skip
    acc = _fold_dq(
        acc, q_tile, d_tile, log, dots, k, v, full0, full1, low, high, end, first, before, ahead,
        k_row, v_row, scale, softcap, SIZE, SOFTCAP, PREFIX, BLOCK_N, BLOCK_D, PRECISION, False,
    )  # fmt: skip
    acc = _fold_dq(
        acc, q_tile, d_tile, log, dots, k, v, full1, end, low, high, end, first, before, ahead,
        k_row, v_row, scale, softcap, SIZE, SOFTCAP, PREFIX, BLOCK_N, BLOCK_D, PRECISION, True,
    )  # fmt: skip
    tl.store(dq + to[:, None] * SIZE + d[None, :], (acc * scale).to(dq.dtype.element_ty), mask=wanted)


@triton.jit
def _next_segment(
    after, j0, j1, cu_q, cu_k, prefix, used, segments, PREFIX: tl.constexpr, USED: tl.constexpr
):  # fmt: skip
    """The first segment past `after` with queries that see one of the rows [j0, j1) of k; S if there is none."""
    found = segments + 0
    chunk = (after + 1) // LANES * LANES
    while (chunk < segments) & (found == segments):
        s = chunk + tl.arange(0, LANES)
        live = (s > after) & (s < segments)
        first, count, before, ahead = find_keys(s, live, cu_k, prefix, used, PREFIX, USED)
        hit = (count > 0) & (first < j1) & (first + count > j0)
        hit |= (ahead > 0) & (before < j1) & (before + ahead > j0)
        hit &= tl.load(cu_q + s + 1, mask=live, other=0) > tl.load(cu_q + s, mask=live, other=0)
        found = tl.min(tl.where(hit, s, segments))
        chunk += LANES
    return found


@triton.jit
def _fold_dkv(
    dk, dv, keys, values, q, dout, lse, delta, r0, r1, low, high, end, begin, q_row, q_head, d_row, d_head, heads,
    scale, softcap, PART: tl.constexpr, SIZE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows [r0, r1) of a segment into dk / scale and dv. Key rows are rows of the tiles, query rows columns."""
    d = tl.arange(0, BLOCK_D)
    for start in tl.range(r0, r1, BLOCK_M):
        r = start + tl.arange(0, BLOCK_M)
        query = (begin + r // PART).to(tl.int64)
        part = r % PART
        inside = r < end
        at_q = q + (query * q_row + part * q_head)[:, None] + d[None, :]
        at_d = dout + (query * d_row + part * d_head)[:, None] + d[None, :]
        if MASKED:
            q_tile = tl.load(at_q, mask=inside[:, None] & (d < SIZE)[None, :], other=0.0)
            d_tile = tl.load(at_d, mask=inside[:, None] & (d < SIZE)[None, :], other=0.0)
            log = tl.load(lse + query * heads + part, mask=inside, other=0.0)
            dots = tl.load(delta + query * heads + part, mask=inside, other=0.0)
        else:
            q_tile = tl.load(at_q, mask=(d < SIZE)[None, :], other=0.0)
            d_tile = tl.load(at_d, mask=(d < SIZE)[None, :], other=0.0)
            log = tl.load(lse + query * heads + part)
            dots = tl.load(delta + query * heads + part)
        s = product(keys, tl.trans(q_tile), PRECISION)
        x, factor, slope = exponents(s, scale, softcap, SOFTCAP)
        if MASKED:
            x = tl.where((r[None, :] >= low[:, None]) & (r[None, :] < high[:, None]), x, -float("inf"))
            log = tl.where(log == -float("inf"), 0.0, log)
        p = tl.exp2(x * factor - (log * 1.4426950408889634)[None, :])
        dv = add_product(p.to(d_tile.dtype), d_tile, dv, PRECISION)
        dp = product(values, tl.trans(d_tile), PRECISION)
        ds = p * (dp - dots[None, :]) * slope
        dk = add_product(ds.to(q_tile.dtype), q_tile, dk, PRECISION)
    return dk, dv


@triton.jit
def _differentiate_keys(
    dout, q, k, v, lse, delta, dk, dv, cu_q, cu_k, prefix, used, segments, keys, scale, softcap, window,
    q_row, q_head, k_row, k_head, v_row, v_head, d_row, d_head,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, PREFIX: tl.constexpr, USED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N rows of k and a key head, from GROUP / SPLITS of its query heads."""
    PART: tl.constexpr = GROUP // SPLITS
    head = tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
    heads = tl.num_programs(1) * PART
    head0 = (tl.program_id(1) * PART).to(tl.int64)
    j0 = tl.program_id(0) * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    q += head0 * q_head
    dout += head0 * d_head
    lse += head0
    delta += head0
    k_tile = load_rows(k + head.to(tl.int64) * k_head, j, j < keys, k_row, SIZE, BLOCK_D, True)
    v_tile = load_rows(v + head.to(tl.int64) * v_head, j, j < keys, v_row, SIZE, BLOCK_D, True)
    k_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    v_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    s = _next_segment(-1, j0, j0 + BLOCK_N, cu_q, cu_k, prefix, used, segments, PREFIX, USED)
    while s < segments:
        begin = tl.load(cu_q + s)
        queries = tl.load(cu_q + s + 1) - begin
        first, count, before, ahead = find_keys(s, s < segments, cu_k, prefix, used, PREFIX, USED)
        # rows [low, high) of the segment see key j
        own = j - first
        low = tl.zeros([BLOCK_N], tl.int32)
        high = low + queries
        if CAUSAL:
            low = tl.maximum(own + queries - count, 0)
        if WINDOW:
            high = tl.minimum(own + queries - count + window, queries)
        is_own = (own >= 0) & (own < count)
        low = tl.where(is_own, low, queries)
        high = tl.where(is_own, high, 0)
        if PREFIX:
            shared = (j >= before) & (j < before + ahead)
            low = tl.where(shared, 0, low)
            high = tl.where(shared, queries, high)
        low = low * PART
        high = high * PART
        low0 = tl.min(low)
        end = tl.max(high)
        full0, full1 = full_blocks(low0, tl.max(low), tl.min(high), BLOCK_M)
        k_acc, v_acc = _fold_dkv(
            k_acc, v_acc, k_tile, v_tile, q, dout, lse, delta, low0, tl.minimum(full0, end), low, high, end, begin,
            q_row, q_head, d_row, d_head, heads, scale, softcap, PART, SIZE, SOFTCAP, BLOCK_M, BLOCK_D, PRECISION,
            True,
        )  # fmt: skip
        k_acc, v_acc = _fold_dkv(
            k_acc, v_acc, k_tile, v_tile, q, dout, lse, delta, full0, full1, low, high, end, begin,
            q_row, q_head, d_row, d_head, heads, scale, softcap, PART, SIZE, SOFTCAP, BLOCK_M, BLOCK_D, PRECISION,
            False,
        )  # fmt: skip
        k_acc, v_acc = _fold_dkv(
            k_acc, v_acc, k_tile, v_tile, q, dout, lse, delta, full1, end, low, high, end, begin,
            q_row, q_head, d_row, d_head, heads, scale, softcap, PART, SIZE, SOFTCAP, BLOCK_M, BLOCK_D, PRECISION,
            True,
        )  # fmt: skip
        s = _next_segment(s, j0, j0 + BLOCK_N, cu_q, cu_k, prefix, used, segments, PREFIX, USED)
    at = ((split.to(tl.int64) * keys + j) * (tl.num_programs(1) // SPLITS) + head)[:, None] * SIZE + d[None, :]
    wanted = (j < keys)[:, None] & (d < SIZE)[None, :]
    tl.store(dk + at, (k_acc * scale).to(dk.dtype.element_ty), mask=wanted)
    tl.store(dv + at, v_acc.to(dv.dtype.element_ty), mask=wanted)


def packed_attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous; arguments and results as those of the op."""
    *_, cu_q, cu_k, prefix, used, causal, scale, window, softcap = Args._make((q, k, v, *rest))
    (tokens, heads, size), (keys, kv_heads, _) = q.shape, k.shape
    group, segments = heads // kv_heads, cu_q.shape[0] - 1
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if dq.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    dout, q, k, v = (dense_rows(t) for t in (dout, q, k, v))
    out, lse, delta = out.contiguous(), lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    launch = attention_launch(q.device.type, size, q.dtype)
    strides = (s for t in (q, k, v, dout) for s in t.stride()[:2])
    numbers = (scale, softcap, window, *strides)
    bounds = index(cu_q, cu_k, prefix, used)
    given = constants(size, group, causal, window, softcap, prefix, used, q.dtype, q.device.type)
    with torch.cuda.device_of(q):
        _differentiate_queries[tokens * group // launch["dq"].m + segments + 2, kv_heads](
            *(dout, lse if dlse is None else dlse.contiguous(), q, k, v, out, lse, dq, delta),
            *(*bounds, segments, tokens, *numbers),
            **(given | {"DLSE": dlse is not None} | launch["dq"].options()),
        )
        if keys == 0:
            return dq, dk, dv
        blocks = triton.cdiv(keys, launch["dkv"].n)
        splits = _splits(blocks * kv_heads, group)
        partial = [t if splits == 1 else q.new_empty((splits, *k.shape), dtype=torch.float32) for t in (dk, dv)]
        _differentiate_keys[blocks, kv_heads * splits](
            *(dout, q, k, v, lse, delta, *partial),
            *(*bounds, segments, keys, *numbers),
            **(given | {"SPLITS": splits} | launch["dkv"].options()),
        )
    if splits > 1:
        dk, dv = (p.sum(0).to(k.dtype) for p in partial)
    return dq, dk, dv


def _splits(programs: int, group: int) -> int:
    """The smallest divisor of the group that makes enough programs, or the group."""
    return next(n for n in range(1, group + 1) if group % n == 0 and (n == group or n * programs >= PROGRAMS))


def backward_cases(shape: Shape) -> Iterator[CompileCase]:
    """The two kernels as a training step of the model launches them."""
    launch, group = attention_launch("cuda", shape.size, shape.dtype), shape.heads // shape.kv_heads
    yield compile_case(_differentiate_queries, "differentiate_queries", shape, launch["dq"], DLSE=False)
    splits = _splits(triton.cdiv(4096, launch["dkv"].n) * shape.kv_heads, group)
    yield compile_case(_differentiate_keys, "differentiate_keys", shape, launch["dkv"], SPLITS=splits)
