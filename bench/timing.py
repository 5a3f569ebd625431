"""Interleaved timing: competitors take turns in one run, so a noisy neighbour slows all of them alike.

Compared are medians; the spread of the per-round ratios says how far the ratio can be trusted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Timer = Callable[[Callable[[], object], int], float]
"""Calls a function so many times in a row and returns the seconds of one call."""


@dataclass(frozen=True)
class Series:
    """Seconds of one competitor, one entry a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Middle value in seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """(25 %, 75 %) in seconds, by linear interpolation; both the value itself if there is but one."""
        return quartiles(self.seconds)

    def as_dict(self) -> dict[str, object]:
        """JSON-able: median_s, q1_s, q3_s, min_s, max_s, rounds, seconds."""
        low, high = self.quartiles
        return {
            "median_s": self.median,
            "q1_s": low,
            "q3_s": high,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "rounds": len(self.seconds),
            "seconds": list(self.seconds),
        }


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """(25 %, 75 %) of the values by linear interpolation; needs at least one value."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def speedup(base: Series, other: Series) -> dict[str, float]:
    """Return by how many times ``other`` is faster than ``base``: ratio of medians, and the per-round ratios' spread.

    The keys are ratio, q1, q3, min, max. Rounds are paired: round i of both ran side by side.
    """
    per_round = [b / o for b, o in zip(base.seconds, other.seconds, strict=True)]
    low, high = quartiles(per_round)
    return {
        "ratio": base.median / other.median,
        "q1": low,
        "q3": high,
        "min": min(per_round),
        "max": max(per_round),
    }


def turns(names: Sequence[str], round_index: int) -> list[str]:
    """Return the order of a round: every competitor once, the first place going round."""
    start = round_index % len(names)
    return [*names[start:], *names[:start]]


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 9,
    warmup: int = 1,
    min_seconds: float = 0.0,
    budget: float | None = None,
    least: int = 3,
    timer: Timer | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Series]:
    """Time callables in turns; returns the seconds per call of each candidate, one entry a round.

    candidates: name -> callable without arguments; results are dropped.
    rounds, warmup: timed rounds, and untimed calls of each before them (compilation and caches belong there).
    min_seconds: a candidate is called so many times in a row that a round lasts about this long; its time is per call.
    budget: seconds that all rounds together may take; after it no round begins, but ``least`` rounds are always made.
    timer: of the device (machine.device_timer); None: the clock, as on a CPU, where a call is over when it returns.
    """
    if rounds < 1:
        raise ValueError(f"interleave: rounds is {rounds}, needs at least 1")

    def by_clock(run: Callable[[], object], repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            run()
        return (clock() - start) / repeats

    timed = timer or by_clock

    repeats = dict.fromkeys(candidates, 1)
    for name, run in candidates.items():
        for _ in range(warmup):
            run()
        if min_seconds > 0:
            repeats[name] = max(1, min(10_000, round(min_seconds / max(timed(run, 1), 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    started = clock()
    for index in range(rounds):
        if budget is not None and index >= least and clock() - started > budget:
            break
        for name in turns(list(candidates), index):
            seconds[name].append(timed(candidates[name], repeats[name]))
    return {name: Series(tuple(values)) for name, values in seconds.items()}
