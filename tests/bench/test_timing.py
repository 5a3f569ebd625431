"""Statistics of interleaved timing."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tinyllava_fast.bench.timing import Series, interleave, quartiles, speedup, turns


class FakeClock:
    """Time that passes only inside candidates."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def candidate(self, name: str, seconds: float):
        def run() -> None:
            self.calls.append(name)
            self.now += seconds

        return run


def test_rounds_rotate_and_medians_are_per_call() -> None:
    clock = FakeClock()
    runs = {name: clock.candidate(name, s) for name, s in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    series = interleave(runs, rounds=3, warmup=1, clock=clock)
    assert clock.calls == [*"abc", *"abc", *"bca", *"cab"]
    assert [series[n].median for n in "abc"] == [1.0, 2.0, 4.0]
    assert series["a"].as_dict()["rounds"] == 3
    json.dumps(series["a"].as_dict())


def test_short_candidates_repeat_until_a_round_is_long_enough() -> None:
    clock = FakeClock()
    series = interleave({"a": clock.candidate("a", 0.01)}, rounds=2, warmup=0, min_seconds=0.1, clock=clock)
    assert len(clock.calls) == 1 + 2 * 10
    assert series["a"].median == pytest.approx(0.01)


def test_a_budget_ends_the_rounds_but_not_before_the_least() -> None:
    for budget, least, expected in ((5.0, 1, 3), (5.0, 4, 4), (100.0, 1, 9)):
        clock = FakeClock()
        runs = {name: clock.candidate(name, 1.0) for name in "ab"}
        series = interleave(runs, rounds=9, warmup=0, budget=budget, least=least, clock=clock)
        assert len(series["a"].seconds) == len(series["b"].seconds) == expected


def test_a_device_times_its_calls_itself() -> None:
    calls: list[int] = []

    def timer(run: Callable[[], object], repeats: int) -> float:
        calls.append(repeats)
        return 0.5

    series = interleave({"a": lambda: None}, rounds=2, warmup=0, min_seconds=2.0, timer=timer)
    assert calls == [1, 4, 4] and series["a"].seconds == (0.5, 0.5)


def test_no_round_is_an_error() -> None:
    with pytest.raises(ValueError, match="rounds is 0"):
        interleave({"a": lambda: None}, rounds=0)


def test_speedup_pairs_the_rounds() -> None:
    base, other = Series((4.0, 8.0, 4.0)), Series((2.0, 2.0, 1.0))
    result = speedup(base, other)
    assert result["ratio"] == 4.0 / 2.0
    assert (result["min"], result["max"]) == (2.0, 4.0)
    assert (result["q1"], result["q3"]) == (3.0, 4.0)


def test_quartiles_interpolate() -> None:
    assert quartiles([3.0]) == (3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0]) == (1.75, 3.25)


def test_everyone_starts_in_turn() -> None:
    assert [turns(["x", "y"], i) for i in range(3)] == [["x", "y"], ["y", "x"], ["x", "y"]]
