"""The choice of samples that share a pack: best-fit inside a look-ahead window. CPU only.

    window = the next `lookahead` samples not yet placed, refilled as samples leave it
    repeat: open a pack with the oldest sample of the window;
            add the longest sample of the window that still fits (the earliest of equals) until none does

No sample starves, since the oldest always opens the next pack. The result depends on the arguments alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

import torch
from torch import Tensor

from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._check import expect
from tinyllava_fast.ops._op import Sample, define_op


def pack_plan(
    lengths: Tensor, images: Tensor, segments: Tensor, budget: int, max_images: int, max_segments: int, lookahead: int
) -> Tensor:
    """Return the pack index of each sample.

    lengths, images, segments: [n] int64 on the CPU: tokens, images and segments that each sample needs. budget,
    max_images, max_segments: what a pack holds of each; lookahead: samples in the window, >= 1.
    Returns [n] int64: pack indices 0, 1, ... in the order in which the packs are complete. Raises ValueError naming the
    first sample that no pack can hold.
    """
    return _pack_plan.op(lengths, images, segments, budget, max_images, max_segments, lookahead)


def _check(
    lengths: Tensor, images: Tensor, segments: Tensor, budget: int, max_images: int, max_segments: int, lookahead: int
) -> None:
    for name, column in (("lengths", lengths), ("images", images), ("segments", segments)):
        expect("pack_plan", name, column, "n", (torch.int64,))
        if column.device.type not in ("cpu", "meta"):
            raise ValueError(f"pack_plan: {name} must be on the CPU, got {column.device}")
        if column.shape != lengths.shape:
            raise ValueError(f"pack_plan: {name} has {len(column)} entries for {len(lengths)} lengths")
    if lookahead < 1:
        raise ValueError(f"pack_plan: lookahead must be >= 1, got {lookahead}")


def _check_values(
    lengths: Tensor, images: Tensor, segments: Tensor, budget: int, max_images: int, max_segments: int, lookahead: int
) -> None:
    for column, low, high, what, remedy in (
        (lengths, 1, budget, "tokens", "budget"),
        (images, 0, max_images, "images", "max_images"),
        (segments, 1, max_segments, "segments", "max_segments"),
    ):
        bad = (column < low) | (column > high)
        if bad.any():
            i = int(bad.nonzero()[0, 0])
            rule = f"more than {remedy} = {high}" if int(column[i]) > high else f"fewer than {low}"
            raise ValueError(f"pack_plan: sample {i} has {int(column[i])} {what}, {rule}")


def _samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)
    for n, lookahead, label in ((200, 32, "ragged"), (64, 1, "no look-ahead"), (1, 8, "one sample"), (0, 8, "nothing")):
        lengths = torch.randint(1, 500, (n,), generator=g)
        images = torch.randint(0, 3, (n,), generator=g)
        segments = torch.randint(1, 5, (n,), generator=g)
        yield Sample((lengths, images, segments, 1000, 4, 9, lookahead), label, differentiable=False)


def _fake(
    lengths: Tensor, images: Tensor, segments: Tensor, budget: int, max_images: int, max_segments: int, lookahead: int
) -> Tensor:
    return torch.empty_like(lengths)


def _cpp_plan(
    lengths: Tensor, images: Tensor, segments: Tensor, budget: int, max_images: int, max_segments: int, lookahead: int
) -> Tensor:
    columns = [column.contiguous() for column in (lengths, images, segments)]
    lookahead = max(1, min(lookahead, len(lengths)))
    window, plan = torch.empty(lookahead, dtype=torch.int64), torch.empty(len(lengths), dtype=torch.int64)
    pointers = [t.data_ptr() for t in (*columns, window, plan)]
    _cpp.extension().pack_plan(*pointers, len(lengths), budget, max_images, max_segments, lookahead)
    return plan


@define_op(
    name="pack_plan",
    module="pack",
    check=_check,
    check_values=_check_values,
    fake=_fake,
    cpp=_cpp_plan,
    samples=_samples,
)
def _pack_plan(
    lengths: Tensor, images: Tensor, segments: Tensor, budget: int, max_images: int, max_segments: int, lookahead: int
) -> Tensor:
    """See pack_plan()."""
    need = list(zip(lengths.tolist(), images.tolist(), segments.tolist(), strict=True))
    n = len(need)
    plan = [-1] * n
    window: list[tuple[int, int]] = []  # (-length, index), sorted: longest first, the earliest of equals first
    arrived = oldest = packs = 0
    while oldest < n:
        room = (budget, max_images, max_segments)
        at: int | None = None
        while True:
            while arrived < n and len(window) < lookahead:
                insort(window, (-need[arrived][0], arrived))
                arrived += 1
            if room[0] == budget:  # an empty pack takes the oldest
                at = bisect_left(window, (-need[oldest][0], oldest))
            else:
                first = bisect_left(window, (-room[0], -1))
                fits = (i for i in range(first, len(window)) if _fits(need[window[i][1]], room))
                at = next(fits, None)
            if at is None:
                break
            index = window.pop(at)[1]
            plan[index] = packs
            room = (room[0] - need[index][0], room[1] - need[index][1], room[2] - need[index][2])
            while oldest < n and plan[oldest] >= 0:
                oldest += 1
            if oldest == n:
                break
        packs += 1
    return torch.tensor(plan, dtype=torch.int64)


def _fits(need: tuple[int, int, int], room: tuple[int, int, int]) -> bool:
    return need[0] <= room[0] and need[1] <= room[1] and need[2] <= room[2]
