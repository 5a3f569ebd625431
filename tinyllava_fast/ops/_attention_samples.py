"""The cases that every implementation of packed attention must get right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tinyllava_fast.ops._op import Sample


def samples() -> Iterator[Sample]:
    """Positional arguments of packed_attention_fwd; floats in float32, seeded."""
    g = torch.Generator().manual_seed(0)

    def ints(values: Sequence[int] | Sequence[tuple[int, int]] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.int32)

    def case(
        label: str,
        lengths_q: list[int],
        heads: tuple[int, int, int],
        *,
        tail: int = 0,
        keys: int | None = None,
        cu_k: list[int] | None = None,
        prefix: list[tuple[int, int]] | None = None,
        used: list[int] | None = None,
        causal: bool = True,
        scale: float = 0.3,
        window: int = 0,
        softcap: float = 0.0,
        strided: bool = False,
    ) -> Sample:
        cu_q = torch.tensor([0, *lengths_q]).cumsum(0).int()
        rows, (h, hkv, size) = int(cu_q[-1]) + tail, heads
        if strided:  # views of one fused projection, as many models produce them
            fused = torch.randn(rows, h + 2 * hkv, size, generator=g)
            q, k, v = fused.split([h, hkv, hkv], dim=1)
        else:
            q = torch.randn(rows, h, size, generator=g)
            k, v = torch.randn(2, rows if keys is None else keys, hkv, size, generator=g)
        index = (cu_q, ints(cu_k), ints(prefix), ints(used))
        return Sample((q, k, v, *index, causal, scale, window, softcap), label)

    yield case("ragged", [5, 17, 1, 40], (2, 2, 16))
    yield case("empty segments and a tail", [0, 9, 0, 23, 0], (6, 2, 32), tail=6)
    yield case("one token", [1], (1, 1, 8))
    yield case("no token", [], (2, 1, 16), tail=3)
    yield case("grouped-query, long", [70, 131], (6, 2, 64))
    yield case("multi-query, head size 80", [33, 64], (4, 1, 80))
    yield case("head size 128", [66, 3], (2, 1, 128))
    yield case("head size 20, full", [12, 50], (2, 2, 20), causal=False)
    yield case("images, full", [49, 49, 49], (3, 3, 64), causal=False)
    yield case("ends inside tiles", [1, 15, 17, 33, 0, 16], (3, 1, 72), strided=True)
    yield case("strided", [19, 30], (4, 2, 32), tail=2, strided=True)
    shared = [(0, 0), (0, 20), (0, 20), (0, 0), (41, 10)]
    yield case("shared prefixes", [20, 9, 12, 17, 11], (4, 2, 32), prefix=shared, tail=3)
    yield case("part of a segment as prefix", [20, 9, 30], (3, 1, 64), prefix=[(0, 0), (3, 14), (7, 13)])
    yield case("fewer queries than keys", [3, 1, 20], (4, 2, 16), cu_k=[0, 30, 31, 70], keys=75)
    yield case("more queries than keys", [9, 4], (2, 1, 16), cu_k=[0, 5, 5], keys=5)
    for label, lengths, heads in (
        ("decode from a pool", [1, 1, 1], (6, 2, 64)),
        ("prefill into a pool", [4, 1, 25], (2, 1, 32)),
    ):
        ahead = [(0, 17), (0, 17), (0, 0)]
        yield case(label, lengths, heads, keys=150, cu_k=[90, 20, 60, 150], used=[13, 1, 25], prefix=ahead)
    yield case("window", [40, 7, 21], (2, 1, 32), window=8)
    yield case("softcap", [15, 28], (4, 2, 32), softcap=2.0)
