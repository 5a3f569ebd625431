"""pack_plan: the packing planner, on a CPU whatever the run's device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinyllava_fast.bench.case import FORWARD, SUITE, Case, Setting, Work
from tinyllava_fast.ops import pack_plan
from tinyllava_fast.ops._op import force_backend


@SUITE.register("pack_plan")
def cases(setting: Setting) -> Iterator[Case]:
    """Sample lengths of a log-normal distribution, as those of LLaVA's instruction data."""
    count = 50 if setting.quick else 20_000
    lengths = torch.empty(count).log_normal_(5.7, 0.5, generator=setting.generator).clamp(16, 2048).long()
    images, segments = torch.ones_like(lengths), torch.ones_like(lengths)
    arguments = (lengths, images, segments, 2048, 64, 64, 512)

    def reference() -> Tensor:
        with force_backend("reference"):
            return pack_plan(*arguments)

    run = {"python": reference, "ours": lambda: pack_plan(*arguments)}
    yield Case("pack_plan", f"n={count} budget=2048 lookahead=512", run, {FORWARD: Work()})
