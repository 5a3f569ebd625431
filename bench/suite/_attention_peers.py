"""Other ways to attend inside the segments of a pack: torch SDPA in three layouts, flex_attention, flash-attn."""

from __future__ import annotations

import functools
from importlib import import_module
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from tinyllava_fast.bench.case import Run

PER_SEGMENT, BLOCK_MASK = "torch sdpa, per segment", "torch sdpa, block mask"
PADDED = "torch sdpa, padded batch"
_sdpa = functools.partial(functional.scaled_dot_product_attention, enable_gqa=True)
PADDING = 0.16
"""Share of padding that a batch of samples of different lengths is given."""


class Peers:
    """q [T, H, Dh] and k, v [T, Hkv, Dh] in causal segments that begin at bounds; all of them return [T, H, Dh]."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, bounds: list[int]) -> None:
        self.qkv, self.bounds = (q, k, v), bounds
        self.lengths = [b - a for a, b in pairwise(bounds)]

    def per_segment(self) -> Tensor:
        """One call a segment."""
        parts = [_attend(*(x[a:b] for x in self.qkv)) for a, b in pairwise(self.bounds)]
        return torch.cat(parts)

    def block_mask(self) -> Run:
        """One call over the pack with a dense [T, T] mask."""
        segment, order = self._positions()
        mask = (segment[:, None] == segment[None, :]) & (order[:, None] >= order[None, :])
        return lambda: _attend(*self.qkv, attn_mask=mask)

    def padded(self) -> Run:
        """A padded batch [S, longest] with a dense mask, or none where all segments are equally long.

        Samples of different lengths are padded so far that PADDING of the batch is padding. Moving rows in and out of
        the batch is part of the time; it is small beside the products.
        """
        device, count = self.qkv[0].device, len(self.lengths)
        total, longest = self.bounds[-1], max(self.lengths)
        equal = min(self.lengths) == longest
        if not equal:
            longest = max(longest, round(total / count / (1 - PADDING)))
        rows = torch.cat([torch.arange(n) + s * longest for s, n in enumerate(self.lengths)]).to(device)
        source = torch.full((count * longest,), total, device=device)
        source[rows] = torch.arange(total, device=device)
        order = torch.arange(longest, device=device)
        real = order[None, :] < torch.tensor(self.lengths, device=device)[:, None]  # [S, longest]
        mask = real[:, None, None, :] & (order[:, None] >= order[None, :])  # [S, 1, longest, longest]

        def batch(x: Tensor) -> Tensor:
            if not equal:
                x = torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, source)
            return x.view(count, longest, *x.shape[1:]).transpose(1, 2)

        def run() -> Tensor:
            q, k, v = (batch(x) for x in self.qkv)
            out = _sdpa(q, k, v, attn_mask=None if equal else mask, is_causal=equal)
            out = out.transpose(1, 2).flatten(0, 1)
            return out if equal else out.index_select(0, rows)

        return run

    def flex(self) -> Run:
        """flex_attention under Inductor with a block mask that skips what no query sees."""
        from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

        segment, order = self._positions()
        tokens, device = len(segment), str(segment.device)

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (segment[i] == segment[j]) & (order[i] >= order[j])

        made: list[BlockMask] = []
        compiled = torch.compile(flex_attention, dynamic=False)

        def run() -> Tensor:
            if not made:
                made.append(create_block_mask(sees, None, None, tokens, tokens, device=device))
            q, k, v = (_heads_first(x if torch.is_grad_enabled() else x.detach()) for x in self.qkv)
            return compiled(q, k, v, block_mask=made[0], enable_gqa=True)[0].transpose(0, 1)

        return run

    def nested(self) -> Run:
        """SDPA over jagged nested tensors; key heads are repeated because its kernels do not group."""
        group = self.qkv[0].shape[1] // self.qkv[1].shape[1]
        offsets = torch.tensor(self.bounds, device=self.qkv[0].device)

        def jagged(x: Tensor) -> Tensor:
            nested = torch.nested.nested_tensor_from_jagged(
                x, offsets, min_seqlen=min(self.lengths), max_seqlen=max(self.lengths)
            )
            return nested.transpose(1, 2)

        def run() -> Tensor:
            q, k, v = self.qkv
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            out = functional.scaled_dot_product_attention(jagged(q), jagged(k), jagged(v), is_causal=True)
            return out.transpose(1, 2).values()

        return run

    def flash_attn(self) -> Run:
        """flash_attn_varlen_func, which takes the pack as it is."""
        attend = import_module("flash_attn").flash_attn_varlen_func
        q, k, v = self.qkv
        cu, longest = torch.tensor(self.bounds, dtype=torch.int32, device=q.device), max(self.lengths)
        return lambda: attend(q, k, v, cu, cu, longest, longest, causal=True)

    def _positions(self) -> tuple[Tensor, Tensor]:
        """(segment of each position, position), [T] each."""
        device = self.qkv[0].device
        segment = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        return segment.to(device), torch.arange(self.bounds[-1], device=device)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)  # [1, H, T, Dh]


def _attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Causal where there is no mask."""
    q, k, v = _heads_first(q), _heads_first(k), _heads_first(v)
    return _sdpa(q, k, v, attn_mask=attn_mask, is_causal=attn_mask is None)[0].transpose(0, 1)
