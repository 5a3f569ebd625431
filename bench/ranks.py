"""`tlf-bench ranks`: the same steps by one process and by several, on the same cores; and how long processes are idle.

Each run is `tlf-train` itself, loader and launcher included: one process with all threads under ``engine.type: torch``,
then so many with their share of the threads under each engine. Runs take turns. The records are a mix of long and
short ones: one image in most, text alone in the others, lengths with a long tail. Idle time of processes is measured
by the run (train/stragglers.py) and reckoned from the work of the packs, shared out as the run does and in turn.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tinyllava_fast.bench import machine, report
from tinyllava_fast.bench.progress import progress
from tinyllava_fast.bench.report import Report
from tinyllava_fast.bench.settings import RanksSettings
from tinyllava_fast.bench.timing import Series, speedup, turns
from tinyllava_fast.config.load import dump, load_run
from tinyllava_fast.config.schema import RunConfig
from tinyllava_fast.data.balance import idle_share, share_out
from tinyllava_fast.data.loader import Loader
from tinyllava_fast.data.pictures import UPRIGHT
from tinyllava_fast.errors import UserError
from tinyllava_fast.hardware import cores
from tinyllava_fast.models.build import build_image_processor, build_model, build_tokenizer
from tinyllava_fast.train.engine.launch import Process
from tinyllava_fast.train.prepare import build_loader
from tinyllava_fast.train.reading import stage_reading

_PICTURES = 8


def benchmark(config: Path, overrides: Sequence[str], settings: RanksSettings) -> Report:
    """Run all and return the report.

    Rows {engine, processes, step, tokens_per_s, idle_share, efficiency}: efficiency is the rate over that of one
    process, and its spread over rounds; idle_share {median, min, max} over rounds. work: idle shares that the packs'
    work gives, {shared_out, in_turn}, at the end of a step.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = _compose(config, overrides, folder, settings)
        loader = _loader(path)
        names = ["torch", *settings.engines]
        steps: dict[str, list[float]] = {name: [] for name in names}
        idle: dict[str, list[float]] = {name: [] for name in names}
        tokens = 0.0
        runs = [(index, engine) for index in range(settings.rounds) for engine in turns(names, index)]
        for index, engine in progress(runs, "runs"):
            lines = _run(path, folder / f"{engine}-{index}", engine, settings)[settings.warmup :]
            steps[engine].append(float(np.mean([line["step_s"] for line in lines])))
            tokens = float(np.mean([line["tokens_per_s"] * line["step_s"] for line in lines]))
            if engine != "torch":
                idle[engine].append(float(np.mean([line["ranks"]["idle_share"] for line in lines])))
    one, rows = Series(tuple(steps["torch"])), []
    for engine in names:
        series = Series(tuple(steps[engine]))
        row: Report = {"engine": engine, "processes": 1 if engine == "torch" else settings.processes}
        row |= {"step": series.as_dict(), "tokens_per_s": tokens / series.median, "efficiency": speedup(one, series)}
        shares = idle[engine] or [0.0]
        rows.append(row | {"idle": {"median": float(np.median(shares)), "min": min(shares), "max": max(shares)}})
    return {
        "rows": rows,
        "work": _reckon(loader, settings),
        "settings": asdict(settings),
        "machine": machine.describe("cpu"),
    }


def _compose(config: Path, overrides: Sequence[str], folder: Path, settings: RanksSettings) -> Path:
    """Write records and the run's YAML; return the latter."""
    run = load_run(config, overrides)
    if len(run.stages) != 1:
        raise UserError(f"{config}: stages: a benchmark run has exactly one stage, this has {len(run.stages)}")
    stage = replace(run.stages[0], data=run.stages[0].data.under(run.data_root))
    if not stage.data.records and not stage.data.sources:
        write_mix(folder, settings.records, settings.seed)
        data = replace(stage.data, records=str(folder / "mix.json"), image_folder=str(folder), overlong="truncate")
        stage = replace(stage, data=data)
    most = max(settings.tokens // 64, 1)
    batch = replace(stage.batch, tokens=settings.tokens, packs_per_step=settings.packs, max_segments=most)
    batch = replace(batch, max_images=most)
    stage = replace(stage, batch=batch, max_steps=settings.warmup + settings.steps)
    checkpoint = replace(run.checkpoint, every_steps=0)
    engine = replace(run.engine, device="cpu")
    whole = replace(run, stages=[stage], data_root=".", log_every=1, loggers=[], checkpoint=checkpoint, engine=engine)
    path = folder / "run.yaml"
    path.write_text(dump(whole), encoding="utf-8")
    return path


def write_mix(folder: Path, count: int, seed: int) -> None:
    """Write mix.json and its images: an image in 16 of 17 records, one to twenty turns, log-normal lengths."""
    rng, pixels = random.Random(seed), np.random.default_rng(seed)
    for number in range(_PICTURES):
        Image.fromarray(pixels.integers(0, 255, (48, 64, 3), np.uint8)).save(folder / f"{number}.png")
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(1000)]

    def text(middle: float, spread: float) -> str:
        return " ".join(rng.choices(words, k=max(int(rng.lognormvariate(middle, spread)), 1)))

    records: list[Report] = []
    for number in range(count):
        shown = number % 17 > 0
        turns_of = max(1, min(20, int(rng.lognormvariate(1.2, 0.8))))
        talk: list[dict[str, str]] = []
        for turn in range(turns_of):
            marker = "<image>\n" if shown and not turn else ""
            talk.append({"from": "human", "value": marker + text(2.2, 0.5)})
            talk.append({"from": "gpt", "value": text(2.5, 1.2)})
        record: Report = {"id": str(number), "conversations": talk}
        if shown:
            record["image"] = f"{number % _PICTURES}.png"
        records.append(record)
    (folder / "mix.json").write_text(json.dumps(records), encoding="utf-8")


def _run(path: Path, output: Path, engine: str, settings: RanksSettings) -> list[Report]:
    """Train once; return the lines of metrics.jsonl."""
    count = 1 if engine == "torch" else settings.processes
    changes = [f"output_dir={output}", f"engine.type={engine}", f"engine.threads={max(cores() // count, 1)}"]
    command = [sys.executable, "-m", "tinyllava_fast.train.cli", str(path), "--resume", "never", *changes]
    command += ["--nproc", str(count)] if count > 1 else []
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"engine.type: {engine}: the run ended with code {done.returncode}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


class _Readers:
    """The parts of a run that ``build_loader`` reads."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.process = config, Process(0, 1, torch.device("cpu"))
        self.tokenizer, self.processor = build_tokenizer(config.model), build_image_processor(config.model)


def _loader(path: Path) -> Loader:
    run = load_run(path)
    readers, stage = _Readers(run), run.stages[0]
    model = build_model(run.model, seed=run.seed, dtype=torch.bfloat16)
    return build_loader(readers, replace(stage, epochs=1.0, max_steps=None), model, stage_reading(stage.data, UPRIGHT))


def _reckon(loader: Loader, settings: RanksSettings) -> Report:
    """Return the idle shares of an epoch that follow from the work of its packs."""
    assert loader.costs is not None  # noqa: S101 build_loader gives them
    data, costs, ranks = loader.dataset, loader.costs, settings.processes
    work = [costs.of(*data.needs(0, tickets), data.tokens_per_image) for tickets in data.plan(0)]
    whole = len(work) // settings.packs * settings.packs
    steps = [work[first : first + settings.packs] for first in range(0, whole, settings.packs)]
    found: Report = {"steps": len(steps), "spread": float(np.std(work) / np.mean(work))}
    for name, known in (("shared_out", 1.0), ("in_turn", 0.0)):  # of equal work, packs go round
        shares = [share_out([known * one for one in step], ranks) for step in steps]
        loads = [
            [sum(step[pack] for pack in own) for own in shared] for step, shared in zip(steps, shares, strict=True)
        ]
        found[name] = idle_share(np.array(loads)) if loads else 0.0
    return found


COLUMNS = {
    "engine": "{engine}",
    "processes": "{processes}",
    "step (median)": "{step[median_s]:time}",
    "min .. max": "{step[min_s]:time} .. {step[max_s]:time}",
    "tokens/s": "{tokens_per_s:,.0f}",
    "of one process": "{efficiency[ratio]:.2f}x",
    "rounds": "{efficiency[min]:.2f} .. {efficiency[max]:.2f}x",
    "idle": "{idle[median]:.1 %}",
}


def show(result: Report) -> None:
    """Print the report as a table."""
    title = (
        "{settings[packs]} packs of {settings[tokens]} tokens a step; by their work (spread {work[spread]:.1 %}) "
        "processes are idle for {work[shared_out]:.1 %} of an epoch, {work[in_turn]:.1 %} with packs in turn"
    )
    report.table(report.fill(title, result), COLUMNS, result["rows"])
