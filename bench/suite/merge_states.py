"""merge_states: two partial attention results into one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinyllava_fast.bench.case import SUITE, Case, Setting, nbytes, pack_of, works
from tinyllava_fast.ops import merge_states


@SUITE.register("merge_states")
def cases(setting: Setting) -> Iterator[Case]:
    """The pack's heads."""
    pack = pack_of(setting)
    a, b = (setting.randn(pack.tokens, pack.heads, pack.head_dim) for _ in range(2))
    lse_a, lse_b = (setting.randn(pack.tokens, pack.heads, grad=False).float() for _ in range(2))

    def plain() -> Tensor:
        share = torch.sigmoid(lse_a - lse_b)[..., None]
        return (share * a + (1 - share) * b).to(a.dtype)

    run = {"torch": plain, **setting.compiled("torch compiled", plain)}
    run["ours"] = lambda: merge_states(a, lse_a, b, lse_b)[0]
    work = works(0.0, nbytes(a, b, lse_a, lse_b), nbytes(a, lse_a), nbytes(a, b))
    label = f"T={pack.tokens} H={pack.heads} Dh={pack.head_dim}"
    yield Case("merge_states", label, run, work, (a, b), (lse_a, lse_b))
