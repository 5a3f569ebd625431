"""The search of `tlf-bench ops --tune` over the real attention kernels, with a clock that says what it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from tinyllava_fast.bench import tune
from tinyllava_fast.bench.case import TINY
from tinyllava_fast.bench.timing import Series
from tinyllava_fast.kernels._common import Launch
from tinyllava_fast.ops._op import force_backend

BEST = Launch(16, 32, 4, 1)


def test_settings_on_trial_reach_the_kernels_and_the_fastest_that_agrees_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, values in (("ROWS", (16, 32)), ("WARPS", (4,)), ("STAGES", (1,))):
        monkeypatch.setattr(tune, name, values)
    raced: list[set[str]] = []

    def race(runs: Mapping[str, Callable[[], Any]]) -> dict[str, Series]:
        raced.append(set(runs))
        return {name: Series((0.5 if name == tune._name(BEST) else 1.0,)) for name in runs}

    with force_backend("triton"):
        problem = tune.Problem(TINY, torch.float32, "cpu")
        present = problem.present()
        found, changes = tune.search(problem, 1 << 20, race)
    assert found == dict.fromkeys(tune.PARTS, BEST) and [c["part"] for c in changes] == list(tune.PARTS)
    for part, names in zip(tune.PARTS, raced, strict=True):
        assert names == {tune._name(present[part])} | {
            f"{m}x{n}, 4 warps, 1 stages" for m in (16, 32) for n in (16, 32)
        }
