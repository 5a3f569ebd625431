"""`tlf-bench parity`: our losses against those of the plainest float32 loop, and that loop's own noise of seeds.

For every seed both train the same weights on the same samples in the same order: ours as configured (packed, our
kernels, the dtype of the config), the reference one sample at a time in float32 (bench/reference.py). A seed sets the
random weights and the order of the samples; the set of samples is the same for all.

    gap     root mean square of (ours - reference) over seeds and steps
    noise   root mean square, over steps, of the standard deviation of the reference over seeds
    bias    mean of (ours - reference) over the last quarter of the steps; its error: noise there / sqrt(seeds)

Parity is a gap of at most the noise, and a bias of at most twice its error. Noise contains the order of the samples, so
the ratio of both says more than the verdict: rounding alone should be far below 1.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tinyllava_fast.bench import machine, report, train
from tinyllava_fast.bench.progress import progress
from tinyllava_fast.bench.report import Report
from tinyllava_fast.bench.samples import write_easy_vqa
from tinyllava_fast.bench.settings import ParitySettings
from tinyllava_fast.config.augment import AugmentConfig
from tinyllava_fast.config.load import dump, load_run
from tinyllava_fast.errors import UserError

Curves = list[list[float]]  # [seed][step]


def compose(config: Path, overrides: Sequence[str], folder: Path, settings: ParitySettings, seed: int) -> Path:
    """Write the run of one seed: the last stage of the config on easy-VQA conversations in an order of the seed's own.

    Turns see each other and images are not augmented: the reference knows no other way. Learning rates are constant.
    """
    run = load_run(config, overrides)
    stage = run.stages[-1]
    for name in ("llm", "vision", "connector"):
        if (kind := getattr(stage.recipe, name).tune) not in ("frozen", "full"):
            raise UserError(f"{config}: recipe.{name}.tune: {kind!r}; the reference knows frozen and full only")
    path, images = write_easy_vqa(folder, settings.steps * settings.samples)
    records = json.loads(path.read_text(encoding="utf-8"))
    random.Random(seed).shuffle(records)
    path.write_text(json.dumps(records), encoding="utf-8")
    data = replace(
        stage.data,
        records=str(path),
        image_folder=str(images),
        turns="conversation",
        turns_per_sample=0,
        augment=AugmentConfig(),
        feature_cache=0.0,
    )
    target = folder / "run.yaml"
    target.write_text(dump(replace(run, stages=[replace(stage, data=data)], seed=seed, data_root=".")), "utf-8")
    return target


def benchmark(config: Path, overrides: Sequence[str], settings: ParitySettings) -> Report:
    """Train every seed on both sides, one process after the other; ``judge`` of the curves, and these."""
    ours: Curves = []
    reference: Curves = []
    for seed in progress(range(settings.seeds), "seeds"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path = compose(config, overrides, folder, settings, seed)
            ours.append(_losses("ours", path, folder, settings))
            reference.append(_losses("reference", path, folder, settings))
    run = load_run(config, overrides)
    return {
        **judge(ours, reference),
        "ours": ours,
        "reference": reference,
        "settings": {**asdict(settings), "dtype": run.engine.dtype, "compile": run.engine.compile},
        "machine": machine.describe(machine.pick_device(run.engine.device)),
    }


def _losses(side: str, path: Path, folder: Path, settings: ParitySettings) -> list[float]:
    with train.start(side, side, path, folder, settings.samples, "--precision", "float32") as worker:
        worker.ready()
        return worker.steps(settings.steps)["losses"]


def judge(ours: Curves, reference: Curves) -> dict[str, float]:
    """Return gap, noise, ratio, bias, bias_error and parity of loss curves [seed][step]; see the head of this file."""
    seeds, steps = len(reference), len(reference[0])
    apart = [[o - r for o, r in zip(*pair, strict=True)] for pair in zip(ours, reference, strict=True)]
    spread = [statistics.stdev(curve[i] for curve in reference) for i in range(steps)]
    last = range(steps - max(1, steps // 4), steps)
    gap, noise = _rms(d for curve in apart for d in curve), _rms(spread)
    bias = statistics.fmean(curve[i] for curve in apart for i in last)
    error = _rms(spread[i] for i in last) / math.sqrt(seeds)
    return {
        "gap": gap,
        "noise": noise,
        "ratio": gap / noise if noise else math.inf,
        "bias": bias,
        "bias_error": error,
        "largest_gap": max(abs(d) for curve in apart for d in curve),
        "parity": gap <= noise and abs(bias) <= 2 * error,
    }


def _rms(values: Iterable[float]) -> float:
    squares = [v * v for v in values]
    return math.sqrt(sum(squares) / len(squares))


def show(result: Report) -> None:
    """Print the report as a table of at most 20 steps."""
    ours, reference = result["ours"], result["reference"]
    steps = len(reference[0])
    every = -(-steps // 20)
    rows = []
    for i in range(0, steps, every):
        both = [f"{o[i]:.4f} / {r[i]:.4f}" for o, r in zip(ours, reference, strict=True)]
        rows.append([str(i), *both, f"{statistics.stdev(r[i] for r in reference):.4f}"])
    title = (
        "{verdict}: gap {gap:.3g}, noise of the seeds {noise:.3g} (ratio {ratio:.3g}); bias at the end {bias:+.2g} "
        "(error {bias_error:.2g})"
    )
    title = report.fill(title, {**result, "verdict": "parity" if result["parity"] else "NO parity"})
    columns = ["step", *(f"seed {i}: ours / reference" for i in range(len(ours))), "spread of the reference"]
    report.show(title, columns, rows)
