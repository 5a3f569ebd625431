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

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tinyllava_fast import hardware
from tinyllava_fast.bench import machine, report, train
from tinyllava_fast.bench.progress import progress
from tinyllava_fast.bench.report import Report
from tinyllava_fast.bench.scaling import line
from tinyllava_fast.bench.settings import RECIPES, FitSettings, TrainSettings
from tinyllava_fast.config.load import load_run

USABLE, CONTEXT = 0.95, 2**30  # fragmentation; CUDA's own memory and that of its libraries
GPUS = (24, 40, 80)  # GiB
OFFLOADED = "full, AdamW"
"""Reckoned once more with masters and moments in the host's memory (engine.offload), by which a CPU gains nothing."""


def benchmark(config: Path, overrides: Sequence[str], settings: FitSettings) -> Report:
    """Measure every recipe; returns {recipes: {name: {state_bytes, sizes, slope, fits}}, bytes_per_token, ...}.

    sizes: for each number of samples tokens, seconds and peak_rss_bytes; empty if the state alone is beyond the limit.
    slope: of its peak, in bytes a token; None without two sizes. bytes_per_token: the steepest of them, or None.
    fits: {GiB of a GPU: tokens a step}, 0 where the state alone is too large, None without bytes_per_token.
    """
    recipes = {name: _measure(config, overrides, settings, name) for name in settings.recipes}
    device = machine.pick_device(load_run(config, overrides).engine.device)
    return reckon(recipes) | {"settings": asdict(settings), "machine": machine.describe(device)}


def reckon(recipes: dict[str, Report]) -> Report:
    """Return the measured recipes and what follows from them: bytes_per_token, and what fits."""
    token = max((one["slope"] for one in recipes.values() if one["slope"] is not None), default=None)
    for name, one in recipes.items():
        state = one["state_bytes"]
        one["fits"] = _fits(sum(state.values()), token)
        if name == OFFLOADED:
            one["fits_offloaded"] = _fits(state["weights"] + state["gradients"], token)
    return {"recipes": recipes, "bytes_per_token": token}


def _measure(config: Path, overrides: Sequence[str], settings: FitSettings, recipe: str) -> Report:
    mode, added = RECIPES[recipe]
    rank, warmup = settings.lora_rank, settings.warmup
    sizes: list[Report] = []
    for samples in progress(sorted(settings.samples), f"{recipe}: sizes of a step"):
        chosen = TrainSettings(rounds=settings.steps, warmup=warmup, samples=samples, mode=mode, lora_rank=rank)
        with train.alone(config, [*overrides, *added], chosen, recipe) as (worker, measured):
            facts = measured.facts
            state = facts["state_bytes"]
            need, limit = sum(state.values()), settings.limit or hardware.available_memory_bytes()
            # weights and masters are there already; gradients and moments come with the first step
            if need > (limit if settings.limit else limit + state["weights"] + state["masters"]):
                break
            worker.steps(warmup)
            measured.add(worker.steps(settings.steps))
        step, peak = measured.series.as_dict(), measured.peak_rss_bytes
        sizes.append({"samples": samples, "tokens": facts["tokens_per_step"], "step": step, "peak_rss_bytes": peak})
    slope = None
    if len(sizes) > 1:
        slope = line([s["tokens"] for s in sizes], [s["peak_rss_bytes"] for s in sizes])["per_token"]
    return {"state_bytes": state, "sizes": sizes, "slope": slope, "parameters": facts["parameters"]}


def _fits(state: float, per_token: float | None) -> dict[str, int] | None:
    if per_token is None or per_token <= 0:
        return None
    return {str(gib): max(0, int((USABLE * gib * 2**30 - CONTEXT - state) / per_token)) for gib in GPUS}


def table(result: Report) -> str:
    """Return the report as a page of Markdown."""
    rows = ["| recipe | " + " | ".join(_columns()) + " |", "|" + "---|" * (1 + len(_columns()))]
    rows += ["| " + " | ".join(row) + " |" for row in _rows(result)]
    page = """\
# Memory of a training step, {parameters:.2f} B parameters

Written by `tlf-bench fit` on {machine[cpu]}, {machine[threads]} threads, torch {machine[torch]}; LoRA of rank \
{settings[lora_rank]}. State: weights, masters, moments and gradients, counted. Peak and seconds: measured, a process \
each. The GPU columns are computed: tokens a step (bench/fit.py), of {token} each.

{rows}
"""
    parameters = next(iter(result["recipes"].values()))["parameters"] / 1e9
    facts = {"parameters": parameters, "token": _mebibytes(result["bytes_per_token"]), "rows": "\n".join(rows)}
    return report.fill(page, result | facts)


def _columns() -> list[str]:
    return ["state", "peak (tokens a step)", "step", "a token more", *(f"{gib} GiB GPU" for gib in GPUS)]


def _mebibytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**20:.2f} MiB"


def _rows(result: Report) -> list[list[str]]:
    rows = []
    for name, one in result["recipes"].items():
        peaks = ", ".join(report.fill("{peak_rss_bytes:GiB} ({tokens:.0f})", size) for size in one["sizes"])
        steps = ", ".join(report.fill("{step[median_s]:time}", size) for size in one["sizes"])
        token, state = _mebibytes(one["slope"]), one["state_bytes"]
        held = report.fill("{held:GiB}", {"held": sum(state.values())})
        rows.append([name, held, peaks or "too large here", steps or "-", token, *_gpus(one["fits"])])
        if "fits_offloaded" in one:
            held = report.fill("{held:GiB}", {"held": state["weights"] + state["gradients"]})
            rows.append([f"{name}, offloaded", held, "-", "-", token, *_gpus(one["fits_offloaded"])])
    return rows


def _gpus(fits: dict[str, int] | None) -> list[str]:
    if fits is None:
        return ["-"] * len(GPUS)
    return [f"{tokens:,} tokens" if tokens else "no" for tokens in fits.values()]


def show(result: Report) -> None:
    """Print the report as a table."""
    report.show("A training step's memory, and what fits", ["recipe", *_columns()], _rows(result))
