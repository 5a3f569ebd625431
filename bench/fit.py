"""`tlf-bench fit`: memory and time of a step of a 1.1 B model by recipe, and what then fits which GPU.

Each recipe and size of step runs in a process of its own. What training keeps between steps is counted from the tensors
that are there: weights as they are stored, float32 masters and moments, and at the end of a backward pass the
gradients, in the weights' dtype and summed in float32. What a token adds is measured: the slope of the peak of memory
between the sizes, the steepest of all recipes; where the update needs more than the activations do, a recipe's own
slope hides them. A GPU then holds

    tokens a step = (USABLE of its memory - CONTEXT - state) / bytes a token

which is computed, not measured; activations of the same kernels' inputs are taken to be as large there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinyllava_fast import hardware
from tinyllava_fast.bench import machine, report, train
from tinyllava_fast.bench.progress import progress
from tinyllava_fast.bench.scaling import line
from tinyllava_fast.bench.timing import Series
from tinyllava_fast.config.load import load_run
from tinyllava_fast.errors import UserError, nearest

WORKLOAD = Path(__file__).parent / "workloads" / "tinyllama_1b.yaml"
USABLE, CONTEXT = 0.95, 2**30  # fragmentation; CUDA's own memory and that of its libraries
GPUS = (24, 40, 80)  # GiB
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {  # name: mode of train, what is added to it
    "qlora": ("qlora", ()),
    "lora": ("lora", ()),
    "full, 8-bit AdamW": ("finetune", ("stages.0.optim.type=adamw8bit",)),
    "full, AdamW": ("finetune", ()),
}
OFFLOADED = "full, AdamW"
"""Also reckoned with masters and moments in the host's memory (engine.offload), which a CPU gains nothing from."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a measurement. Raises UserError for values that measure nothing."""

    recipes: tuple[str, ...] = tuple(RECIPES)
    samples: tuple[int, ...] = (1, 3)  # of a step; two sizes give the slope
    steps: int = 2  # timed, of each size
    warmup: int = 1  # untimed: moments are made there
    lora_rank: int = 128
    limit: int = 0  # bytes that a recipe's state may take here; 0: the memory that is available

    def __post_init__(self) -> None:
        for name in self.recipes:
            if name not in RECIPES:
                raise UserError(f"--recipe {name!r}; {nearest(name, RECIPES)}")
        if len(set(self.samples)) < 2:
            raise UserError("--samples: two sizes of a step are needed to tell what a token adds")
        self.of(self.recipes[0], min(self.samples))

    def of(self, recipe: str, samples: int) -> train.Settings:
        """The settings of one measurement as ``train`` has them."""
        mode, rank = RECIPES[recipe][0], self.lora_rank
        return train.Settings(rounds=self.steps, warmup=self.warmup, samples=samples, mode=mode, lora_rank=rank)


def benchmark(
    config: Path = WORKLOAD, overrides: Sequence[str] = (), settings: Settings | None = None
) -> dict[str, Any]:
    """Measure every recipe; returns {recipes: {name: {state_bytes, sizes, slope, fits}}, bytes_per_token, ...}.

    sizes: for each number of samples tokens, seconds and peak_rss_bytes; empty if the state alone is beyond the limit.
    slope: of its peak, in bytes a token; None without two sizes. bytes_per_token: the steepest of them, or None.
    fits: {GiB of a GPU: tokens a step}, 0 where the state alone is too large, None without bytes_per_token.
    """
    settings = settings or Settings()
    recipes = {name: _measure(config, overrides, settings, name) for name in settings.recipes}
    device = machine.pick_device(load_run(config, overrides).engine.device)
    return reckon(recipes) | {"settings": asdict(settings), "machine": machine.describe(device)}


def reckon(recipes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The measured recipes and what follows from them: bytes_per_token, and what fits."""
    token = max((one["slope"] for one in recipes.values() if one["slope"] is not None), default=None)
    for name, one in recipes.items():
        state = one["state_bytes"]
        one["fits"] = _fits(sum(state.values()), token)
        if name == OFFLOADED:
            one["fits_offloaded"] = _fits(state["weights"] + state["gradients"], token)
    return {"recipes": recipes, "bytes_per_token": token}


def _measure(config: Path, overrides: Sequence[str], settings: Settings, recipe: str) -> dict[str, Any]:
    sizes: list[dict[str, Any]] = []
    for samples in progress(sorted(settings.samples), f"{recipe}: sizes of a step"):
        with tempfile.TemporaryDirectory() as name:
            folder, chosen = Path(name), settings.of(recipe, samples)
            path = train.compose(config, [*overrides, *RECIPES[recipe][1]], folder, chosen)
            with train.start(recipe, "ours", path, folder, samples) as worker:
                facts = worker.ready()
                state = facts["state_bytes"]
                need, limit = sum(state.values()), settings.limit or hardware.available_memory_bytes()
                # weights and masters are there already; gradients and moments come with the first step
                if need > (limit if settings.limit else limit + state["weights"] + state["masters"]):
                    break
                worker.steps(settings.warmup)
                answer = worker.steps(settings.steps)
        series, tokens = Series(tuple(answer["seconds"])), facts["tokens_per_step"]
        peak = answer["peak_rss_bytes"]
        sizes.append({"samples": samples, "tokens": tokens, "step": series.as_dict(), "peak_rss_bytes": peak})
    slope = None
    if len(sizes) > 1:
        slope = line([s["tokens"] for s in sizes], [s["peak_rss_bytes"] for s in sizes])["per_token"]
    return {"state_bytes": state, "sizes": sizes, "slope": slope, "parameters": facts["parameters"]}


def _fits(state: float, per_token: float | None) -> dict[str, int] | None:
    if per_token is None or per_token <= 0:
        return None
    return {str(gib): max(0, int((USABLE * gib * 2**30 - CONTEXT - state) / per_token)) for gib in GPUS}


def table(result: dict[str, Any]) -> str:
    """The report as a page of Markdown."""
    rows = ["| recipe | " + " | ".join(_columns()) + " |", "|" + "---|" * (1 + len(_columns()))]
    rows += ["| " + " | ".join(row) + " |" for row in _rows(result)]
    facts, settings = result["machine"], result["settings"]
    parameters = next(iter(result["recipes"].values()))["parameters"] / 1e9
    return "\n".join(
        [
            f"# Memory of a training step, {parameters:.2f} B parameters",
            "",
            f"Written by `tlf-bench fit` on {facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}; LoRA "
            f"of rank {settings['lora_rank']}. State: weights, masters, moments and gradients, counted. Peak and "
            "seconds: measured, a process each. The GPU columns are computed: tokens a step (bench/fit.py), of "
            f"{_mebibytes(result['bytes_per_token'])} each.",
            "",
            *rows,
            "",
        ]
    )


def _columns() -> list[str]:
    return ["state", "peak (tokens a step)", "step", "a token more", *(f"{gib} GiB GPU" for gib in GPUS)]


def _mebibytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**20:.2f} MiB"


def _rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, one in result["recipes"].items():
        peaks = ", ".join(f"{s['peak_rss_bytes'] / 2**30:.2f} GiB ({s['tokens']:.0f})" for s in one["sizes"])
        steps = ", ".join(report.seconds(s["step"]["median_s"]) for s in one["sizes"])
        token = _mebibytes(one["slope"])
        state = f"{sum(one['state_bytes'].values()) / 2**30:.2f} GiB"
        rows.append([name, state, peaks or "too large here", steps or "-", token, *_gpus(one["fits"])])
        if "fits_offloaded" in one:
            moved = one["state_bytes"]["weights"] + one["state_bytes"]["gradients"]
            row = [f"{name}, offloaded", f"{moved / 2**30:.2f} GiB", "-", "-", token]
            rows.append([*row, *_gpus(one["fits_offloaded"])])
    return rows


def _gpus(fits: dict[str, int] | None) -> list[str]:
    if fits is None:
        return ["-"] * len(GPUS)
    return [f"{tokens:,} tokens" if tokens else "no" for tokens in fits.values()]


def show(result: dict[str, Any]) -> None:
    """The report as a table."""
    report.show("A training step's memory, and what fits", ["recipe", *_columns()], _rows(result))
