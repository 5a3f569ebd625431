"""The ops on their real shapes, next to what plain torch offers for the same result.

Shapes are those of one step of `tlf-bench train`: SmolLM2-135M (9 heads, 3 key heads of 64, width 576, 49152 tokens)
over a pack of eight easy-VQA records with 196 image tokens each, 19 supervised tokens a record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional

from tinyllava_fast.bench.linears import Case, linear_cases
from tinyllava_fast.ops import (
    decode_attention,
    linear_cross_entropy,
    merge_states,
    pack_plan,
    packed_attention,
    splice,
)
from tinyllava_fast.ops._op import force_backend

# Legend: T tokens, S segments, H heads, Hkv key heads, Dh head size, D width, V vocabulary, R image rows, M supervised


@dataclass(frozen=True)
class Shapes:
    """Sizes of one pack and one model."""

    lengths: tuple[int, ...] = (352, 361, 368, 372, 376, 381, 388, 394)
    tokens: int = 3008
    image_tokens: int = 196
    supervised: int = 19
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    width: int = 576
    vocabulary: int = 49152
    planned: int = 20_000  # samples the packing planner places


TINY = Shapes((9, 14, 5), 32, 3, 2, 4, 2, 8, 32, 101, 50)


def cases(shapes: Shapes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Every public op, with seeded inputs. Nothing is compiled before it is first called."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int, grad: bool = True) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype).requires_grad_(grad)

    yield _splice(shapes, randn, generator, device)
    yield _attention(shapes, randn, device)
    yield _merge(shapes, randn)
    yield _cross_entropy(shapes, randn, generator, device)
    yield from linear_cases(shapes.tokens, shapes.width, randn, generator, device)
    yield _decode(shapes, randn, device)
    if device == "cpu":
        yield _pack(shapes, generator)


def _splice(s: Shapes, randn: Callable[..., Tensor], generator: torch.Generator, device: str) -> Case:
    ids = torch.randint(0, s.vocabulary, (s.tokens,), generator=generator).to(device)
    starts = list(accumulate(s.lengths, initial=0))[:-1]
    slots = torch.cat([torch.arange(b + 1, b + 1 + s.image_tokens) for b in starts]).to(device)
    weight, features = randn(s.vocabulary, s.width), randn(len(slots), s.width)

    def plain() -> Tensor:
        return functional.embedding(ids, weight).index_copy(0, slots, features)

    run = {
        "torch": plain,
        "torch compiled": torch.compile(plain),
        "ours": lambda: splice(ids, weight, features, slots),
    }
    label = f"T={s.tokens} D={s.width} V={s.vocabulary} R={len(slots)}"
    return Case("splice", label, run, (weight, features))


def _decode(s: Shapes, randn: Callable[..., Tensor], device: str) -> Case:
    """One token of one sequence: the image and the question are its keys."""
    rows = s.image_tokens + s.supervised + 25
    q = randn(1, s.heads, s.head_dim, grad=False)
    k, v = (randn(rows + 3, s.kv_heads, s.head_dim, grad=False) for _ in range(2))
    start, used = (torch.tensor([n], dtype=torch.int32, device=device) for n in (3, rows))

    def sdpa() -> Tensor:
        keys, values = (x[3:].transpose(0, 1).unsqueeze(0) for x in (k, v))
        return functional.scaled_dot_product_attention(q.transpose(0, 1).unsqueeze(0), keys, values, enable_gqa=True)[
            0
        ].transpose(0, 1)

    run = {
        "torch": sdpa,
        "torch compiled": torch.compile(sdpa),
        "ours": lambda: decode_attention(q, k, v, start, used),
    }
    return Case("decode_attention", f"keys={rows} H={s.heads} Hkv={s.kv_heads} Dh={s.head_dim}", run)


def _merge(s: Shapes, randn: Callable[..., Tensor]) -> Case:
    a, b = randn(s.tokens, s.heads, s.head_dim), randn(s.tokens, s.heads, s.head_dim)
    lse_a, lse_b = (randn(s.tokens, s.heads, grad=False).float() for _ in range(2))

    def plain() -> Tensor:
        share = torch.sigmoid(lse_a - lse_b)[..., None]
        return (share * a + (1 - share) * b).to(a.dtype)

    run = {
        "torch": plain,
        "torch compiled": torch.compile(plain),
        "ours": lambda: merge_states(a, lse_a, b, lse_b)[0],
    }
    return Case("merge_states", f"T={s.tokens} H={s.heads} Dh={s.head_dim}", run, (a, b))


def _attention(s: Shapes, randn: Callable[..., Tensor], device: str) -> Case:
    bounds = list(accumulate(s.lengths, initial=0))
    cu = torch.tensor(bounds, dtype=torch.int32, device=device)
    q = randn(s.tokens, s.heads, s.head_dim)
    k, v = randn(s.tokens, s.kv_heads, s.head_dim), randn(s.tokens, s.kv_heads, s.head_dim)
    segment = torch.searchsorted(cu[1:].contiguous(), torch.arange(s.tokens, device=device), right=True)
    order = torch.arange(s.tokens, device=device)
    mask = (segment[:, None] == segment[None, :]) & (order[:, None] >= order[None, :])  # [T, T]

    def heads_first(x: Tensor) -> Tensor:
        return x.transpose(0, 1).unsqueeze(0)  # [1, H, T, Dh]

    def block_mask() -> Tensor:
        out = functional.scaled_dot_product_attention(
            heads_first(q), heads_first(k), heads_first(v), attn_mask=mask, enable_gqa=True
        )
        return out[0].transpose(0, 1)[: bounds[-1]]

    def per_segment() -> Tensor:
        parts = [
            functional.scaled_dot_product_attention(
                heads_first(q[a:b]), heads_first(k[a:b]), heads_first(v[a:b]), is_causal=True, enable_gqa=True
            )[0].transpose(0, 1)
            for a, b in pairwise(bounds)
        ]
        return torch.cat(parts)

    run = {
        "torch sdpa, block mask": block_mask,
        "torch sdpa, per segment": per_segment,
        "torch sdpa, per segment, compiled": torch.compile(per_segment),
        "ours": lambda: packed_attention(q, k, v, cu)[0][: bounds[-1]],
    }
    triangle = sum(n * (n + 1) // 2 for n in s.lengths)
    label = f"T={s.tokens} S={len(s.lengths)} H={s.heads}/{s.kv_heads} Dh={s.head_dim}"
    flops = 4.0 * triangle * s.heads * s.head_dim
    return Case("packed_attention", label, run, (q, k, v), flops)


def _cross_entropy(s: Shapes, randn: Callable[..., Tensor], generator: torch.Generator, device: str) -> Case:
    labels = torch.full((s.tokens,), -100)
    ends = list(accumulate(s.lengths))
    rows = torch.cat([torch.arange(e - s.supervised, e) for e in ends])
    labels[rows] = torch.randint(0, s.vocabulary, (len(rows),), generator=generator)
    supervised = torch.full((s.tokens,), s.tokens)
    supervised[: len(rows)] = rows
    labels, rows, supervised = labels.to(device), rows.to(device), supervised.to(device)
    hidden, weight = randn(s.tokens, s.width), randn(s.vocabulary, s.width)

    def plain() -> Tensor:
        logits = functional.linear(hidden.index_select(0, rows), weight)
        return functional.cross_entropy(logits.float(), labels.index_select(0, rows), reduction="sum")

    run = {
        "torch": plain,
        "torch compiled": torch.compile(plain),
        "ours": lambda: linear_cross_entropy(hidden, weight, labels, supervised),
    }
    label = f"T={s.tokens} D={s.width} V={s.vocabulary} rows={len(rows)}"
    flops = 2.0 * len(rows) * s.width * s.vocabulary
    return Case("linear_cross_entropy", label, run, (hidden, weight), flops)


def _pack(s: Shapes, generator: torch.Generator) -> Case:
    lengths = torch.empty(s.planned).log_normal_(5.7, 0.5, generator=generator).clamp(16, 2048).long()
    images, segments = torch.ones_like(lengths), torch.ones_like(lengths)
    arguments = (lengths, images, segments, 2048, 64, 64, 512)

    def reference() -> Tensor:
        with force_backend("reference"):
            return pack_plan(*arguments)

    run = {"python": reference, "ours": lambda: pack_plan(*arguments)}
    return Case("pack_plan", f"n={s.planned} budget=2048 lookahead=512", run)
