"""The gradient noise scale: about how large a step pays, from the norms of a step's gradient and of a part of it.

As "An Empirical Model of Large-Batch Training" (arXiv 1812.06162, appendix A.1) estimates it. A mean gradient over n
tokens has, on average, a squared norm of signal + variance / n; two sizes in one step tell both. The part is what a
process has after its first pack: its own gradient under ddp, that of the first packs of all processes under fsdp, which
sums them at once. The unit is a supervised token, of which a pack is a cluster: the variance is that of packs as they
are. Both are noisy in one step, so the noise scale is the ratio of their running means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from tinyllava_fast.config.schema import EngineConfig, StageConfig
from tinyllava_fast.errors import UserError

DECAY = 0.99
"""Of the running means, a step: they remember about 100."""
_MEANS = ("signal", "variance", "tokens", "weight")  # the last two: supervised tokens of a step, and steps


class NoiseEntry(TypedDict):
    """In a line of metrics.jsonl: the noise scale in supervised tokens and in packs; None: no signal stands out."""

    tokens: float | None
    packs: float | None


@dataclass(frozen=True)
class _Step:
    """What is kept of a step, on its device. square, tokens: of the part. norm, all_tokens: of the whole."""

    square: Tensor
    tokens: int
    norm: Tensor
    all_tokens: float


def check_noise(stage: StageConfig, engine: EngineConfig, processes: int) -> None:
    """Raise UserError if no part of a step is known, or if the part is the whole step."""
    if not stage.optim.noise_scale:
        return
    if engine.type == "deepspeed" and engine.sharding:
        raise UserError(
            "optim.noise_scale with engine.type: deepspeed, which does not show the gradient of a part of a step; set "
            "engine.type to ddp or fsdp, or noise_scale: false"
        )
    parts = stage.batch.packs_per_step // (processes if engine.type == "fsdp" else 1)
    if parts < 2:
        least = 2 * processes if engine.type == "fsdp" else 2
        raise UserError(
            "optim.noise_scale compares a part of a step with the whole: set "
            f"batch.packs_per_step to {least} or more, or "
            "noise_scale: false"
        )


def estimate(part: float, tokens: float, whole: float, all_tokens: float) -> tuple[float, float]:
    """Return signal and variance from the squared norms of two mean gradients, over so many tokens each."""
    signal = (all_tokens * whole - tokens * part) / (all_tokens - tokens)
    variance = (part - whole) / (1.0 / tokens - 1.0 / all_tokens)
    return signal, variance


def open_noise(stage: StageConfig, engine: EngineConfig, kept: dict[str, dict[str, float]]) -> NoiseScale | None:
    """Return the noise scale of a stage that wants it. kept: of each stage, the checkpoint's."""
    if not stage.optim.noise_scale:
        return None
    means = kept.setdefault(stage.name, {})
    return NoiseScale(means, stage.batch.packs_per_step, shared=engine.type == "fsdp")


class NoiseScale:
    """The noise scale of a stage. means: running means by name, changed in place: the checkpoint's.

    packs: of a step, over all processes. shared: the part is that of all processes, of which each has its rows.
    """

    def __init__(self, means: dict[str, float], packs: int, *, shared: bool) -> None:
        self._means, self._packs, self._shared = means, packs, shared
        for name in _MEANS:
            means.setdefault(name, 0.0)
        self._steps: list[_Step] = []
        self._part = torch.zeros(()), 0

    def begin(self, square: Tensor, tokens: int) -> None:
        """Note this process's part of a step: the squared norm [] of its gradient, its supervised tokens."""
        self._part = square, tokens

    def end(self, norm: Tensor, all_tokens: float) -> None:
        """Note the whole step: the norm [] of its gradient, which is divided by as many tokens as the part's was."""
        self._steps.append(_Step(*self._part, norm, all_tokens))

    def settle(self, all_reduce_sum: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Take in the steps since the last time: one copy from the device, one sum over processes."""
        steps, self._steps = self._steps, []
        if not steps:
            return
        squares = torch.stack([one.square.to(device, torch.float64) for one in steps])
        norms = torch.stack([one.norm.to(device, torch.float64) for one in steps]).tolist()
        parts = torch.stack([squares, torch.tensor([one.tokens for one in steps], device=device).double()], dim=1)
        if self._shared:
            parts = all_reduce_sum(parts)
        sums = torch.zeros(len(steps), 3, dtype=torch.float64)  # signal, variance, and of how many processes
        for row, one, (square, tokens), norm in zip(sums, steps, parts.tolist(), norms, strict=True):
            if 0 < tokens < one.all_tokens and math.isfinite(square) and math.isfinite(norm):
                signal, variance = estimate(square * (one.all_tokens / tokens) ** 2, tokens, norm**2, one.all_tokens)
                row += torch.tensor([signal, variance, 1.0], dtype=torch.float64)
        for (signal, variance, count), one in zip(all_reduce_sum(sums.to(device)).tolist(), steps, strict=True):
            if count:
                fresh = (signal / count, variance / count, one.all_tokens, 1.0)
                for name, value in zip(_MEANS, fresh, strict=True):
                    self._means[name] = DECAY * self._means[name] + value

    def entry(self) -> NoiseEntry:
        """Return what the line that is due says, after ``settle``."""
        means = self._means
        if means["signal"] <= 0 or means["variance"] <= 0:
            return {"tokens": None, "packs": None}
        scale, of_a_pack = means["variance"] / means["signal"], means["tokens"] / means["weight"] / self._packs
        return {"tokens": scale, "packs": scale / of_a_pack}
