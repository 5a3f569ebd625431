"""splice: image features laid over embedded text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from tinyllava_fast.bench.case import SUITE, Case, Setting, nbytes, pack_of, works
from tinyllava_fast.ops import splice


@SUITE.register("splice")
def cases(setting: Setting) -> Iterator[Case]:
    """The pack in SmolLM2-135M's and in TinyLlama's width."""
    yield _case(setting, main=True)
    if not setting.quick:
        yield _case(setting, main=False, width=2048, vocabulary=32000)


def _case(setting: Setting, *, main: bool, **changes: int) -> Case:
    pack = pack_of(setting, **changes)
    ids = setting.randint(pack.vocabulary, pack.tokens)
    bounds = list(pairwise(pack.bounds))
    images = [(a, min(pack.image_tokens, b - a - 2)) for a, b in bounds]  # an image begins at the second token
    slots = torch.cat([torch.arange(a + 1, a + 1 + n) for a, n in images]).to(setting.device)
    weight, features = setting.randn(pack.vocabulary, pack.width), setting.randn(len(slots), pack.width)
    counts = [n for _, n in images]

    def plain() -> Tensor:
        return functional.embedding(ids, weight).index_copy(0, slots, features)

    def per_sample() -> Tensor:
        """As LLaVA does it: each sample is cut at its image, its text embedded and put together again."""
        rows = []
        for (a, b), n, image in zip(bounds, counts, features.split(counts), strict=True):
            before, after = ids[a : a + 1], ids[a + 1 + n : b]
            text = functional.embedding(torch.cat([before, after]), weight)
            rows.append(torch.cat([text[: len(before)], image, text[len(before) :]]))
        return torch.cat(rows)

    run = {"torch": plain, "torch, per sample": per_sample}
    if main:
        run |= setting.compiled("torch compiled", plain)
    run["ours"] = lambda: splice(ids, weight, features, slots)
    rows = pack.tokens * pack.width * weight.element_size()
    label = f"T={pack.tokens} D={pack.width} V={pack.vocabulary} R={len(slots)}"
    work = works(0.0, rows, rows, nbytes(weight, features))
    headline = {"splice_vs_index_copy": "torch"} if main else {}
    return Case("splice", label, run, work, (weight, features), (ids, slots), headline=headline, main=main)
