"""What the validations of a stage have found so far, and what follows: which model is best, and when the stage ends.

It lies in the state of the run, and a step's number alone decides whether a validation follows it; so a resumed run
validates, keeps and ends as the whole one does.
"""

from __future__ import annotations

import math
from typing import TypedDict

from tinyllava_fast.config.validation import LOSS, ValidationConfig
from tinyllava_fast.log import log

COST = 0.02  # most of a stage's FLOPs that validations take where no interval is given; of its time under 3 %
MOST = 10  # and most validations of a stage then


class Validation(TypedDict, total=False):
    """The result of a validation, as a line of metrics.jsonl holds it."""

    loss: float
    """Mean over the supervised tokens, without label smoothing and z-loss; missing where no records are held out."""
    scores: dict[str, float]
    """Headline of each benchmark."""
    samples: int
    supervised_tokens: int
    seconds: float
    best: bool
    """Whether it is the best so far."""


class Best(TypedDict):
    """The best validation of a stage."""

    step: int
    metric: str
    value: float


class Standing(TypedDict, total=False):
    """The validations of a stage so far, as its checkpoints hold them."""

    last: Validation
    last_step: int
    best: Best
    answers: dict[str, str]
    """To the samples, by their keys."""
    answers_before: dict[str, str]
    """Of the validation before."""
    measured: str
    """A checksum of what the best was found with: the records or the benchmark."""
    waited: int
    """Validations since the best."""
    ended_early: bool
    seconds: float
    """Of all validations."""


def interval(config: ValidationConfig, steps: int, cost: float) -> int:
    """Return the steps between validations; 0: only at the end. cost: of one, in steps."""
    if config.every_steps is not None:
        return config.every_steps
    times = min(MOST, int(COST * steps / cost)) if cost > 0 else MOST
    return math.ceil(steps / times) if times > 1 else 0


def judge(standing: Standing, config: ValidationConfig, step: int, found: Validation, measured: str = "") -> None:
    """Note a validation in the standing of its stage: whether it is the best, and whether the stage is to end.

    measured: a checksum of what it was found with; "": not known. A run that was resumed with another metric, or with
    other records, begins its search for the best model anew.
    """
    value, best = value_of(config, found), standing.get("best")
    if best is not None and (reason := _incomparable(best, standing, config, measured)):
        log.warning(
            "the best model so far, of step %d, %s: the search for the best begins anew at step %d",
            *(best["step"], reason, step),
        )
        best = None
    standing["measured"] = measured
    # of benchmarks the larger score is the better one
    sign = 1.0 if config.metric == LOSS else -1.0
    found["best"] = math.isfinite(value) and (best is None or sign * value < sign * best["value"])
    if found["best"]:
        standing["best"] = {"step": step, "metric": config.metric, "value": value}
    standing["waited"] = 0 if found["best"] else standing.get("waited", 0) + 1
    standing["ended_early"] = 0 < config.patience <= standing["waited"]
    standing["last"], standing["last_step"] = found, step
    standing["seconds"] = standing.get("seconds", 0.0) + found["seconds"]


def _incomparable(best: Best, standing: Standing, config: ValidationConfig, measured: str) -> str:
    """Return why the best so far cannot be compared with what is found now; "" if it can."""
    if best["metric"] != config.metric:
        return f"was chosen by {best['metric']}, not by {config.metric} (validation.metric)"
    before = standing.get("measured", "")
    if before and measured and before != measured:
        return "was validated with something else (validation.records, max_packs or benchmarks have changed)"
    return ""


def value_of(config: ValidationConfig, found: Validation) -> float:
    """Return the number that the stage's models are compared by; nan if there is none."""
    return found.get("loss", math.nan) if config.metric == LOSS else found["scores"][config.metric]


def ends_with_best(config: ValidationConfig, standing: Standing) -> bool:
    """Return whether the stage's output is its best model, not its last one."""
    return config.keep == "best" and "best" in standing


def outcome(config: ValidationConfig, standing: Standing) -> dict[str, object]:
    """Return what the run's summary says of a stage's validations."""
    last = {"step": standing.get("last_step"), **standing.get("last", {})}
    return {
        "best": standing.get("best"),
        "last": {key: value for key, value in last.items() if key not in ("best", "seconds")},
        "output": "best" if ends_with_best(config, standing) else "last",
        "ended_early": standing.get("ended_early", False),
        "seconds": standing.get("seconds", 0.0),
    }


def numbers_of(found: Validation) -> str:
    """Return the loss and the scores of a validation in words."""
    numbers = {"validation loss": f"{found['loss']:.4f}"} if "loss" in found else {}
    numbers |= {name: f"{score:.4g}" for name, score in found.get("scores", {}).items()}
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


def said(standing: Standing) -> str:
    """Return the last validation of a stage in words."""
    last, best = standing["last"], standing.get("best")
    text = f"step {standing['last_step']}: {numbers_of(last)}"
    if last["best"]:
        text += ", the best so far"
    elif best is not None:
        text += f"; the best is {best['value']:.4f} of step {best['step']}"
    text += f" ({last['seconds']:.1f} s)"
    if standing["ended_early"]:
        text += f"; no better one in {standing['waited']} validations: the stage ends here (validation.patience)"
    return text
