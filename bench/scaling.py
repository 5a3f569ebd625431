"""`tlf-bench scaling`: how time and memory of our training step grow with its tokens.

Each size of step runs in a process of its own, one after the other: memory that waits beside another size would be
missing there. The straight lines through the measurements say what a token costs; how far the measurements lie from
them says whether "linear" is true.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tinyllava_fast.bench import machine, report, train
from tinyllava_fast.bench.report import Report
from tinyllava_fast.bench.settings import ScalingSettings, TrainSettings
from tinyllava_fast.config.load import load_run


def benchmark(config: Path, overrides: Sequence[str], settings: ScalingSettings) -> Report:
    """Measure every size; rows {factor, samples, tokens, samples_per_s, step, peak_rss_bytes}, and the two lines.

    time and memory: per_token and fixed, of the least-squares line through (tokens, median step) and (tokens, peak);
    off: the largest relative distance of a measurement from it. relative_cost: time of a token at the largest size
    over that at the smallest.
    """
    sizes = {factor: _measure(config, overrides, settings, factor) for factor in sorted(settings.factors)}
    rows: list[Report] = []
    for factor, one in sizes.items():
        samples = factor * settings.samples
        facts = {"factor": factor, "samples": samples, "tokens": one.facts["tokens_per_step"]}
        rows.append(facts | one.speed(samples))
    tokens = [row["tokens"] for row in rows]
    return {
        "rows": rows,
        "time": line(tokens, [one.series.median for one in sizes.values()]),
        "memory": line(tokens, [one.peak_rss_bytes for one in sizes.values()]),
        "relative_cost": rows[0]["tokens_per_s"] / rows[-1]["tokens_per_s"],
        "settings": asdict(settings),
        "machine": machine.describe(machine.pick_device(load_run(config, overrides).engine.device)),
    }


def _measure(config: Path, overrides: Sequence[str], settings: ScalingSettings, factor: int) -> train.Measured:
    chosen = TrainSettings(
        rounds=settings.steps,
        warmup=settings.warmup,
        samples=settings.samples * factor,
        mode=settings.mode,
        lora_rank=settings.lora_rank,
    )
    with train.alone(config, overrides, chosen) as (worker, measured):
        measured.add(worker.steps(settings.warmup), warmup=True)
        measured.add(worker.steps(settings.steps))
    return measured


def line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Return the least-squares line: {per_token, fixed, off}; off: largest relative distance of a y from it."""
    slope, start = statistics.linear_regression(x, y)
    off = max(abs(start + slope * a - b) / b for a, b in zip(x, y, strict=True))
    return {"per_token": slope, "fixed": start, "off": off}


def show(result: Report) -> None:
    """Print the report as a table."""
    title = (
        "A token costs {ms:.3g} ms and {kib:.0f} KiB (off the line by at most {time[off]:.0 %} and "
        "{memory[off]:.0 %}); {relative_cost:.2f}x the time at the largest step"
    )
    costs = {"ms": 1e3 * result["time"]["per_token"], "kib": result["memory"]["per_token"] / 2**10}
    columns = {"": "{factor}x", "tokens a step": "{tokens:,.0f}", **train.SPEED}
    report.table(report.fill(title, result | costs), columns, result["rows"])
