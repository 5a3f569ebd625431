"""Learning-rate schedules as a pure function of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math


def warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """Return the steps of linear warm-up: the share of the stage, rounded up, never the whole stage."""
    return min(math.ceil(total_steps * warmup_ratio), max(total_steps - 1, 0))


def lr_factor(
    step: int,
    *,
    total_steps: int,
    schedule: str,
    warmup_ratio: float = 0.0,
    min_lr_ratio: float = 0.0,
    decay_ratio: float = 0.1,
) -> float:
    """Return the factor in [0, 1] that multiplies the peak learning rate of the given step.

    step: 0 for the first optimizer step of the stage, total_steps - 1 for the last. Warm-up rises linearly and never
    uses 0: step i of w warm-up steps has (i + 1) / w. Then cosine or linear decay from 1 towards min_lr_ratio, which
    the step after the last would reach; or a constant 1; or 1 until the last decay_ratio of the steps, in which it
    falls linearly (wsd: warm-up, stable, decay); or 1 / sqrt(1 + i / w) of the i-th step after w steps of warm-up
    (inverse_sqrt), which no longer depends on the number of steps to come. Raises ValueError for an unknown schedule.
    """
    warmup = warmup_steps(total_steps, warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        decay = 1.0 - progress
    elif schedule == "cosine":
        decay = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif schedule == "wsd":
        falling = min(math.ceil(total_steps * decay_ratio), total_steps - warmup)
        decay = min((total_steps - step) / max(falling, 1), 1.0) if step < total_steps else 0.0
    elif schedule == "inverse_sqrt":
        decay = 1.0 / math.sqrt(1.0 + (step - warmup) / max(warmup, 1))
    else:
        raise ValueError(f"unknown schedule {schedule!r}; known: cosine, linear, constant, wsd, inverse_sqrt")
    return min_lr_ratio + (1.0 - min_lr_ratio) * decay
