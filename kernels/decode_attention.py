"""Attention of one new token a sequence on a GPU: keys split over programs (Flash-Decoding, pytorch.org/blog, 2023).

A few sequences of a few key heads would leave most of a GPU idle, so the keys of each are cut into as many parts as
fill it, and a second kernel adds the parts up by their log-sum-exps. How many is decided from shapes alone; how long a
part is, from the lengths on the device: nothing waits for them, and a CUDA graph holds for every length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyllava_fast.kernels._attention import SHAPES, Shape, constants, fold
from tinyllava_fast.kernels._common import (
    LAUNCH,
    TRITON_TYPES,
    CompileCase,
    Launch,
    attention_launch,
    power_of_2,
)
from tinyllava_fast.ops._attention_args import dense_rows

MOST_SPLITS = 64
WAVES = 2
"""Programs a multiprocessor is given, so that one computes while another waits for memory."""
_INTERPRETED_SPLITS = 3


@triton.jit
def attend_one(
    q, k, v, out, logs, begin, used, prefix, scale, softcap, q_row, q_head, k_row, k_head, v_row, v_head,
    GROUP: tl.constexpr, SIZE: tl.constexpr, SOFTCAP: tl.constexpr, PREFIX: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The query heads of one sequence and key head over one part of its keys; the rows of a tile are those heads.

    out: [S, H, Dh]; if SPLIT [S, H, parts, Dh] float32, and logs [S, H, parts] the log2 of the sums of exponentials.
    """
    s = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    parts = tl.num_programs(2)
    first = tl.load(begin + s)
    before = first * 0
    ahead = first * 0
    if PREFIX:
        before = tl.load(prefix + 2 * s)
        ahead = tl.load(prefix + 2 * s + 1)
    count = ahead + tl.load(used + s)
    length = tl.cdiv(tl.cdiv(count, parts), BLOCK_N) * BLOCK_N
    j0 = tl.minimum(part * length, count)
    end = tl.minimum(j0 + length, count)
    whole = j0 + (end - j0) // BLOCK_N * BLOCK_N

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    wanted = (m < GROUP)[:, None] & (d < SIZE)[None, :]
    row = s.to(tl.int64)
    at = row * q_row + (head * GROUP + m) * q_head
    q_tile = tl.load(q + at[:, None] + d[None, :], mask=wanted, other=0.0)
    k += head.to(tl.int64) * k_head
    v += head.to(tl.int64) * v_head
    low = m * 0
    high = low + end
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    acc, total, peak = fold(
        acc, total, peak, q_tile, k, v, j0, whole, low, high, end, first, before, ahead,
        k_row, v_row, scale, softcap, SIZE, SOFTCAP, PREFIX, BLOCK_N, BLOCK_D, PRECISION, False,
    )  # fmt: skip
    acc, total, peak = fold(
        acc, total, peak, q_tile, k, v, whole, end, low, high, end, first, before, ahead,
        k_row, v_row, scale, softcap, SIZE, SOFTCAP, PREFIX, BLOCK_N, BLOCK_D, PRECISION, True,
    )  # fmt: skip
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    to = row * (tl.num_programs(1) * GROUP) + head * GROUP + m
    if SPLIT:
        to = to * parts + part
        tl.store(logs + to, tl.where(total == 0, -float("inf"), peak + tl.log2(total)), mask=m < GROUP)
    tl.store(out + to[:, None] * SIZE + d[None, :], acc.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def add_parts(partial, logs, out, parts, SIZE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[row] = sum of its parts, each weighted by its share of the sum of exponentials; zeros if it saw no key."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    log = tl.load(logs + row * parts + p, mask=p < parts, other=-float("inf"))
    largest = tl.max(log, 0)
    share = tl.exp2(log - tl.where(largest == -float("inf"), 0.0, largest))
    total = tl.sum(share, 0)
    inside = (p < parts)[:, None] & (d < SIZE)[None, :]
    tile = tl.load(partial + (row * parts + p)[:, None] * SIZE + d[None, :], mask=inside, other=0.0)
    value = tl.sum(tile * share[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + row * SIZE + d, value.to(out.dtype.element_ty), mask=d < SIZE)


def decode_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, used: Tensor, prefix: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """[S, H, Dh]; see ops/decode_attention.py."""
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    q, k, v, start, used = dense_rows(q), dense_rows(k), dense_rows(v), start.contiguous(), used.contiguous()
    (sequences, heads, size), kv_heads = q.shape, k.shape[1]
    parts = _parts(q.device, sequences * kv_heads)
    launch, fixed = _settings(q.device.type, size, q.dtype, heads // kv_heads, softcap)
    partial, logs = out, out
    if parts > 1:
        partial = q.new_empty((sequences, heads, parts, size), dtype=torch.float32)
        logs = q.new_empty((sequences, heads, parts), dtype=torch.float32)
    with torch.cuda.device_of(q):
        attend_one[sequences, kv_heads, parts](
            *(q, k, v, partial, logs, start, used, start if prefix is None else prefix.contiguous(), scale, softcap),
            *(step for t in (q, k, v) for step in t.stride()[:2]),
            **{**fixed, "PREFIX": prefix is not None, "SPLIT": parts > 1},
            **launch.options(),
        )
        if parts > 1:
            add_parts[(sequences * heads,)](
                *(partial, logs, out, parts),
                **_reduction(size, parts),
                num_warps=4,
                **LAUNCH,
            )
    return out


def _parts(device: torch.device, rows: int) -> int:
    """Parts of each sequence's keys for so many (sequence, key head) pairs."""
    if device.type == "cpu":
        return _INTERPRETED_SPLITS
    return max(1, min(MOST_SPLITS, WAVES * _multiprocessors(device.index) // rows))


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _settings(
    device: str, size: int, dtype: torch.dtype, group: int, softcap: float
) -> tuple[Launch, dict[str, int | str]]:
    """The launch, and the compile-time arguments but PREFIX and SPLIT."""
    forward = attention_launch(device, size, dtype)["decode"]
    keys = 16 if dtype == torch.float32 and size > 64 else forward.n  # exact products of more spill
    launch = Launch(power_of_2(group, 16, 128), keys, forward.warps, forward.stages)
    every = constants(size, group, False, 0, softcap, None, None, dtype, device)
    return launch, {name: every[name] for name in ("GROUP", "SIZE", "SOFTCAP", "BLOCK_D", "PRECISION")}


def _reduction(size: int, parts: int) -> dict[str, int]:
    return {"SIZE": size, "BLOCK_P": power_of_2(parts, 2, MOST_SPLITS), "BLOCK_D": triton.next_power_of_2(size)}


def compile_cases() -> Iterator[CompileCase]:
    """The decoders among the shapes of small models, their keys in parts; one in a single part."""
    for shape in SHAPES:
        if shape.causal:
            yield _case(shape, SPLIT=True)
            yield _reduction_case(shape)
    yield _case(SHAPES[0], SPLIT=False)


def _case(shape: Shape, *, SPLIT: bool) -> CompileCase:
    launch, fixed = _settings("cuda", shape.size, shape.dtype, shape.heads // shape.kv_heads, shape.softcap)
    kind = TRITON_TYPES[shape.dtype]
    types = dict.fromkeys(("q", "k", "v"), f"*{kind}") | {"out": "*fp32" if SPLIT else f"*{kind}", "logs": "*fp32"}
    types |= dict.fromkeys(("begin", "used", "prefix"), "*i32") | {"scale": "fp32", "softcap": "fp32"}
    types |= {f"{name}_{step}": "i32:16" for name in "qkv" for step in ("row", "head")}
    constexprs = {**fixed, "PREFIX": True, "SPLIT": SPLIT, **launch.blocks()}
    label = f"{shape}, {'parts' if SPLIT else 'one part'}"
    has_dot = shape.dtype != torch.float32
    return CompileCase("attend_one", label, attend_one, types, constexprs, launch.warps, launch.stages, has_dot)


def _reduction_case(shape: Shape) -> CompileCase:
    types = {"partial": "*fp32", "logs": "*fp32", "out": f"*{TRITON_TYPES[shape.dtype]}", "parts": "i32"}
    fixed = _reduction(shape.size, MOST_SPLITS)
    return CompileCase("add_parts", str(shape), add_parts, types, fixed, 4, 3, False)
