"""Triton kernel of ops/draw_tokens.py: one program a row reads it twice, and once more the block that the token is in.

The row stays in the L2 cache between the passes: 49,152 logits are 98 KB in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyllava_fast.kernels._common import LAUNCH, TRITON_TYPES, CompileCase, power_of_2

BLOCK = 2048
"""Logits a program holds at a time: 8 a thread with 8 warps; of twice as many the float64 sums spill on sm_90."""
WARPS = 8


@triton.jit
def weights_at(x, at, vocab, top, heat, least):
    """The float64 weights of the columns ``at``, zero beyond the vocabulary and where less than ``least``."""
    value = tl.load(x + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
    weight = tl.exp((value - top) / heat)
    return tl.where((at < vocab) & (weight >= least), weight, 0.0).to(tl.float64)


@triton.jit
def draw_row(logits, temperature, min_p, point, out, vocab, stride, BLOCK: tl.constexpr):
    """out[row] = its token; -1 where the row holds what is no number."""
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * stride
    column = tl.arange(0, BLOCK)
    top = float("-inf")
    greedy = vocab * 0
    wrong = vocab * 0
    for start in range(0, vocab, BLOCK):
        at = start + column
        value = tl.load(x + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
        wrong += tl.sum(((value != value) | (value == float("inf"))).to(tl.int32), 0)
        largest = tl.max(value, 0)
        place = tl.min(tl.where(value == largest, at, vocab), 0)
        greedy = tl.where(largest > top, place, greedy)
        top = tl.maximum(top, largest)
    wrong += tl.where(top == float("-inf"), 1, 0)
    found = greedy
    heat = tl.load(temperature + row).to(tl.float32)
    if (heat > 0) & (wrong == 0):
        least = tl.load(min_p + row).to(tl.float32)
        total = tl.load(point + row) * 0
        for start in range(0, vocab, BLOCK):
            total += tl.sum(weights_at(x, start + column, vocab, top, heat, least), 0)
        goal = tl.load(point + row) * total
        # the block in which the sum passes the goal; rounding may leave none: then the last token that may come
        before = goal * 0
        sum_there = goal * 0
        block = vocab * 0 - 1
        last = vocab * 0
        for start in range(0, vocab, BLOCK):
            weight = weights_at(x, start + column, vocab, top, heat, least)
            last = tl.maximum(last, tl.max(tl.where(weight > 0, start + column, 0), 0))
            after = before + tl.sum(weight, 0)
            here = (block < 0) & (after > goal)
            sum_there = tl.where(here, before, sum_there)
            block = tl.where(here, start, block)
            before = after
        found = last
        if block >= 0:
            weight = weights_at(x, block + column, vocab, top, heat, least)
            reached = tl.sum((sum_there + tl.cumsum(weight, 0) <= goal).to(tl.int32), 0)
            found = tl.minimum(block + reached, last)
    tl.store(out + row, tl.where(wrong > 0, -1, found).to(tl.int64))


def draw_tokens(x: Tensor, temperature: Tensor, min_p: Tensor, point: Tensor) -> Tensor:
    """[R] int64; see ops/draw_tokens.py."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(len(x), dtype=torch.int64, device=x.device)
    if len(x):
        with torch.cuda.device_of(x):
            draw_row[(len(x),)](
                *(x, temperature.contiguous(), min_p.contiguous(), point.contiguous(), out, x.shape[1], x.stride(0)),
                BLOCK=_block(x.device.type, x.shape[1]),
                num_warps=WARPS,
                **LAUNCH,
            )
    return out


def _block(device: str, vocab: int) -> int:
    """Small blocks in the interpreter, so that tests cross them."""
    return 1024 if device == "cpu" else power_of_2(vocab, 128, BLOCK)


def compile_cases() -> Iterator[CompileCase]:
    """Every dtype."""
    fixed = dict.fromkeys(("temperature", "min_p", "point"), "*fp64") | {"out": "*i64"}
    fixed |= {"vocab": "i32:16", "stride": "i32:16"}
    for kind in TRITON_TYPES.values():
        types = {"logits": f"*{kind}", **fixed}
        yield CompileCase("draw_row", f"V=49152 {kind}", draw_row, types, {"BLOCK": BLOCK}, WARPS, 3, False)
