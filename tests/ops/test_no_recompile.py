"""A compiled training function meets every raggedness with one graph: lengths are values, never shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from tinyllava_fast.ops import linear_cross_entropy, packed_attention, splice

TOKENS, SEGMENTS, IMAGE, WIDTH, HEADS, KV_HEADS, WORDS = 48, 5, 4, 32, 4, 2, 61


def batch(generator: torch.Generator, step: int) -> tuple[Tensor, ...]:
    """ids [T], cu_seqlens [S + 1], image slots [S * IMAGE], labels [T], supervised [T]; padding where less is used."""
    segments = 1 + step % SEGMENTS
    cuts = torch.randperm(TOKENS - 1, generator=generator)[:segments].sort().values + 1
    cu = torch.full((SEGMENTS + 1,), int(cuts[-1]), dtype=torch.int32)
    cu[0] = 0
    cu[1 : segments + 1] = cuts
    slots = torch.full((SEGMENTS * IMAGE,), TOKENS)
    images = step % (SEGMENTS + 1)  # none at all in the first step
    slots[: images * IMAGE] = torch.randperm(TOKENS, generator=generator)[: images * IMAGE].sort().values
    ids = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    rows = torch.randperm(TOKENS, generator=generator)[: 5 * step].sort().values
    labels = torch.full((TOKENS,), -100)
    labels[rows] = ids[rows]
    supervised = torch.full((TOKENS,), TOKENS)
    supervised[: len(rows)] = rows
    return ids, cu, slots, labels, supervised


def step(ids: Tensor, cu: Tensor, slots: Tensor, labels: Tensor, supervised: Tensor, table: Tensor, image: Tensor,
         mix: Tensor) -> Tensor:  # fmt: skip
    x = splice(ids, table, image, slots)
    q, k, v = (x @ mix).split([WIDTH, WIDTH // 2, WIDTH // 2], dim=1)
    out, _ = packed_attention(q.view(TOKENS, HEADS, -1), k.view(TOKENS, KV_HEADS, -1), v.view(TOKENS, KV_HEADS, -1), cu)
    return linear_cross_entropy(x + out.flatten(1), table, labels, supervised)


def test_ten_raggednesses_one_graph_forward_and_backward() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = ((WORDS, WIDTH), (SEGMENTS * IMAGE, WIDTH), (WIDTH, 2 * WIDTH))
    leaves = [torch.randn(size, generator=generator).requires_grad_() for size in sizes]
    graphs: list[str] = []
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(10):
            inputs = batch(generator, number)
            got = compiled(*inputs, *leaves)
            expected = step(*inputs, *leaves)
            torch.testing.assert_close(got, expected)
            pairs = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True)
            for one, other in pairs:
                torch.testing.assert_close(one, other)
            graphs.append(str(counters["stats"]["unique_graphs"]))
    assert graphs == ["1"] * 10
