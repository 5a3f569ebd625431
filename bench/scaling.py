"""`tlf-bench scaling`: how time and memory of our training step grow with its tokens.

Each size of step runs in a process of its own, one after the other: memory that waits beside another size would be
missing there. The straight lines through the measurements say what a token costs; how far the measurements lie from
them says whether "linear" is true.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinyllava_fast.bench import machine, report, train
from tinyllava_fast.bench.timing import Series
from tinyllava_fast.config.load import load_run
from tinyllava_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which sizes are measured. Raises UserError for values that measure nothing."""

    factors: tuple[int, ...] = (1, 2, 4)  # of ``samples``
    samples: int = 4  # a step at factor 1
    steps: int = 4  # timed, of each size
    warmup: int = 2  # untimed, of each size
    mode: str = "finetune"  # of train.MODES
    lora_rank: int = 128

    def __post_init__(self) -> None:
        if min(self.factors, default=0) < 1 or len(set(self.factors)) < max(len(self.factors), 2):
            raise UserError(f"--factor {' '.join(map(str, self.factors))}: name at least two sizes, each once")
        self.of(1)  # checks the rest

    def of(self, factor: int) -> train.Settings:
        """The settings of one size as ``train`` has them."""
        return train.Settings(
            rounds=self.steps,
            warmup=self.warmup,
            samples=self.samples * factor,
            mode=self.mode,
            lora_rank=self.lora_rank,
        )


def benchmark(
    config: Path = train.WORKLOAD, overrides: Sequence[str] = (), settings: Settings | None = None
) -> dict[str, Any]:
    """Measure every size; rows {factor, samples, tokens, samples_per_s, step, peak_rss_bytes}, and the two lines.

    time and memory: per_token and fixed, of the least-squares line through (tokens, median step) and (tokens, peak);
    off: the largest relative distance of a measurement from it. relative_cost: time of a token at the largest size
    over that at the smallest.
    """
    settings = settings or Settings()
    rows = [_measure(config, overrides, settings, factor) for factor in sorted(settings.factors)]
    tokens = [row["tokens"] for row in rows]
    device = machine.pick_device(load_run(config, overrides).engine.device)
    return {
        "rows": rows,
        "time": line(tokens, [row["step"]["median_s"] for row in rows]),
        "memory": line(tokens, [row["peak_rss_bytes"] for row in rows]),
        "relative_cost": (rows[0]["tokens_per_s"] / rows[-1]["tokens_per_s"]),
        "settings": asdict(settings),
        "machine": machine.describe(device),
    }


def _measure(config: Path, overrides: Sequence[str], settings: Settings, factor: int) -> dict[str, Any]:
    chosen = settings.of(factor)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = train.compose(config, overrides, folder, chosen)
        with train.start("ours", "ours", path, folder, chosen.samples) as worker:
            facts = worker.ready()
            worker.steps(settings.warmup)
            answer = worker.steps(settings.steps)
    series = Series(tuple(answer["seconds"]))
    return {
        "factor": factor,
        "samples": chosen.samples,
        "tokens": facts["tokens_per_step"],
        "samples_per_s": chosen.samples / series.median,
        "tokens_per_s": facts["tokens_per_step"] / series.median,
        "step": series.as_dict(),
        "peak_rss_bytes": answer["peak_rss_bytes"],
    }


def line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """The least-squares line: {per_token, fixed, off}; off: largest relative distance of a y from it."""
    slope, start = statistics.linear_regression(x, y)
    off = max(abs(start + slope * a - b) / b for a, b in zip(x, y, strict=True))
    return {"per_token": slope, "fixed": start, "off": off}


def show(result: dict[str, Any]) -> None:
    """The report as a table."""
    rows = [
        [
            f"{row['factor']}x",
            f"{row['tokens']:,.0f}",
            f"{row['samples_per_s']:.3f}",
            f"{row['tokens_per_s']:,.0f}",
            report.seconds(row["step"]["median_s"]),
            f"{report.seconds(row['step']['min_s'])} .. {report.seconds(row['step']['max_s'])}",
            f"{row['peak_rss_bytes'] / 2**30:.2f} GiB",
        ]
        for row in result["rows"]
    ]
    time, memory = result["time"], result["memory"]
    title = (
        f"A token costs {1e3 * time['per_token']:.3g} ms and {memory['per_token'] / 2**10:.0f} KiB (off the line by at "
        f"most {100 * time['off']:.0f} % and {100 * memory['off']:.0f} %); {result['relative_cost']:.2f}x the time at "
        "the largest step"
    )
    report.show(
        title, ["", "tokens a step", "samples/s", "tokens/s", "step (median)", "min .. max", "peak memory"], rows
    )
