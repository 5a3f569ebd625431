"""The preallocated K/V memory of the inference engine and the bookkeeping of its rows.

Rows of a sequence are one contiguous range, not a list of blocks: attention then reads keys by a start and a length,
and needs no block table. What blocks would save is what ranges waste: rows reserved for answers that end early, and
holes between ranges. A sequence therefore reserves only a few rows beyond those it has written, and grows in place or
by one copy to a larger range (``Spans.extend``, ``KVPool.move``). Simulated on long and short answers, ten to an image,
62 % of the rows of a pool that is refilled when half of it is free are in use; blocks of 16 would have 67 %, ranges
reserved for the longest answer 24 % (tests/infer/scheduling/test_pool.py simulates the first and the last).

Legend: P rows of the pool, L decoder layers, Hkv key-value heads, Dh head width.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tinyllava_fast.errors import UserError
from tinyllava_fast.hardware import available_memory_bytes
from tinyllava_fast.log import log
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.ops import _cpp

BATCH_TOKENS = 16384


class Spans:
    """First-fit allocator of contiguous row ranges in [0, size). Freed neighbours merge.

    reclaim: gives some rows back that are only kept in case they are useful; returns whether there were any.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.reclaim: Callable[[], bool] | None = None
        self.free_rows = size
        self._holes: list[tuple[int, int]] = [(0, size)] if size else []

    def take(self, rows: int) -> int | None:
        """Start of a free range of that many rows, or None if there is none."""
        start = self._first_fit(rows)
        while start is None and self.reclaim is not None and self.reclaim():
            start = self._first_fit(rows)
        return start

    def _first_fit(self, rows: int) -> int | None:
        for i, (start, length) in enumerate(self._holes):
            if length >= rows:
                rest = [(start + rows, length - rows)] if length > rows else []
                self._holes[i : i + 1] = rest
                self.free_rows -= rows
                return start
        return None

    def extend(self, stop: int, rows: int) -> bool:
        """Take the rows from ``stop`` on, where a range taken before ends; False if they are not all free."""
        for i, (start, length) in enumerate(self._holes):
            if start == stop and length >= rows:
                self._holes[i : i + 1] = [(start + rows, length - rows)] if length > rows else []
                self.free_rows -= rows
                return True
        return False

    def give(self, start: int, rows: int) -> None:
        """Return a range that take() handed out, or a part of it."""
        if not rows:
            return
        self.free_rows += rows
        insort(self._holes, (start, rows))
        merged: list[tuple[int, int]] = []
        for hole_start, length in self._holes:
            if merged and sum(merged[-1]) == hole_start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((hole_start, length))
        self._holes = merged


class KVPool:
    """K and V of every layer for P token rows, allocated once.

    kv_heads: Hkv of each layer. k, v: L tensors [P, Hkv, Dh] each. rows: the allocator. Rows are written by the
    attention function, through ``KVView.slots``; nothing is ever concatenated.
    """

    def __init__(
        self, rows: int, kv_heads: list[int], head_dim: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        def layers() -> list[Tensor]:
            if device.type == "cpu":  # in huge pages, zeroed when first touched
                return [_cpp.zeros(rows, heads, head_dim, dtype=dtype) for heads in kv_heads]
            return [torch.zeros(rows, heads, head_dim, dtype=dtype, device=device) for heads in kv_heads]

        self.k, self.v = layers(), layers()
        self.rows = Spans(rows)

    def move(self, start: int, target: int, rows: int) -> None:
        """Copy rows to another range; the two may not overlap."""
        for tensor in (*self.k, *self.v):
            tensor[target : target + rows] = tensor[start : start + rows]

    def take_memory(self) -> None:
        """Take all of a new pool's memory from the system now, and not as its rows are used: it is zeroed."""
        touch((*self.k, *self.v), "the K/V pool", "lower batch_tokens")

    @property
    def nbytes(self) -> int:
        """Bytes held by the pool."""
        return sum(t.nbytes for t in (*self.k, *self.v))


def touch(tensors: Sequence[Tensor], name: str, remedy: str) -> None:
    """Zero new tensors, so that the system has to find their memory now. A warning tells where there is not as much."""
    if not tensors or not tensors[0].is_cpu:
        return
    needed, available = sum(t.nbytes for t in tensors), available_memory_bytes()
    if needed > available:
        log.warning(
            "%s takes up to %.1f GB, and %.1f GB are available; %s", name, needed / 1e9, available / 1e9, remedy
        )
        return
    for tensor in tensors:
        tensor.zero_()


def row_bytes(kv_heads: list[int], head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one token in a pool: K and V of every layer."""
    return 2 * sum(kv_heads) * head_dim * dtype.itemsize


def pool_rows(lmm: LMM, batch_tokens: int | None, kv_cache_bytes: int | None) -> int:
    """Rows of the pool. UserError if both sizes are given or nothing fits."""
    if kv_cache_bytes is None:
        rows, said = BATCH_TOKENS if batch_tokens is None else batch_tokens, f"batch_tokens is {batch_tokens}"
    elif batch_tokens is not None:
        raise UserError(
            f"batch_tokens={batch_tokens} and kv_cache_bytes={kv_cache_bytes} size one pool; give one of them"
        )
    else:
        one = row_bytes(lmm.num_kv_heads, lmm.head_dim, lmm.dtype)
        rows, said = kv_cache_bytes // one, f"kv_cache_bytes is {kv_cache_bytes}, a token takes {one}"
    if rows < 2:
        raise UserError(f"{said}; the K/V pool needs room for a prompt and its answer")
    return rows
