"""The content of a report, gathered from a run folder. The HTML page and the picture both draw from this."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, cast

from tinyllava_fast.eval.results import read_results, read_verdicts
from tinyllava_fast.eval.types import Results, Timings

SMOOTHED_OVER = 1 / 30  # of a curve's points: the span of the exponential mean drawn over the raw loss


@dataclass(frozen=True)
class Curve:
    """Loss of one training stage. steps count on over the stages."""

    stage: str
    steps: list[int]
    losses: list[float]

    @property
    def smooth(self) -> list[float]:
        """Exponential mean of the logarithms, corrected for its start: what a logarithmic chart shows without lag."""
        share = 1 / max(1.0, SMOOTHED_OVER * len(self.losses))
        out, mean, weight = [], 0.0, 0.0
        for loss in self.losses:
            mean += share * (math.log(max(loss, 1e-12)) - mean)
            weight += share * (1 - weight)
            out.append(math.exp(mean / weight))
        return out


@dataclass(frozen=True)
class Shot:
    """One question about one image, as answered. right: it earned full credit."""

    key: str
    image: Path
    question: str
    truth: str
    answer: str
    right: bool


class Summary(TypedDict, total=False):
    """The part of a training run's summary.json that a report shows; {} without training."""

    train_seconds: float
    samples_per_s: float
    tokens_per_s: float
    steps: int
    peak_rss_bytes: int


@dataclass(frozen=True)
class Evaluated:
    """One benchmark's results, with the headline and its first breakdown as shares 0..1."""

    results: Results
    run: Timings
    accuracy: float
    by_type: dict[str, tuple[int, float]]
    """Questions and accuracy of each type."""
    wrong: int


@dataclass(frozen=True)
class ReportData:
    """Everything in a report. blind is None and summary is empty where the run has none."""

    title: str
    seen: Evaluated
    blind: Evaluated | None
    summary: Summary
    curves: list[Curve]
    shots: list[Shot]
    mistakes: list[Shot]
    config: str = ""
    note: str = ""
    rows: list[tuple[str, int, float, float | None]] = field(default_factory=list)
    """(type, questions, accuracy, blind accuracy) with a last row for all."""

    @property
    def peak_rss_bytes(self) -> int:
        """The larger peak of the training and the evaluation."""
        return max(self.seen.run["peak_rss_bytes"], self.summary.get("peak_rss_bytes", 0))


def gather(
    run_dir: Path, results_dir: Path, blind_dir: Path | None, *, note: str = "", shots: int = 32, seed: int = 0
) -> ReportData:
    """Collect a report's content.

    run_dir: folder of tlf-train (metrics.jsonl, summary.json, config.yaml; each optional). results_dir, blind_dir:
    folders of one benchmark, written by tlf-eval. note: a sentence about the data, for the reader. shots are a seeded
    random draw, one an image; mistakes a seeded draw among the wrong ones.
    Raises UserError if results_dir holds no finished evaluation.
    """
    seen = _evaluated(results_dir)
    blind = _evaluated(blind_dir) if blind_dir is not None else None
    everything = [
        Shot(v["key"], Path(v["images"][0]), v["prompt"], v["truth"], v["answer"] or "", v["credit"] == 1)
        for v in read_verdicts(results_dir)
        if v["images"]
    ]
    random.Random(seed).shuffle(everything)
    drawn = _one_per_image(everything, shots)
    mistakes = _one_per_image([s for s in everything if not s.right and s not in drawn], 8)
    config = run_dir / "config.yaml"
    return ReportData(
        title=run_dir.resolve().name,
        seen=seen,
        blind=blind,
        summary=_json(run_dir / "summary.json"),
        curves=read_curves(run_dir / "metrics.jsonl"),
        shots=drawn,
        mistakes=mistakes,
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        note=note,
        rows=_rows(seen, blind),
    )


def read_curves(path: Path) -> list[Curve]:
    """The loss of each stage from metrics.jsonl, in the order of training; [] if there is no such file."""
    stages: dict[str, Curve] = {}
    if not path.exists():
        return []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        curve = stages.setdefault(entry["stage"], Curve(entry["stage"], [], []))
        if entry["loss"] is None:  # of steps that were all skipped
            continue
        curve.steps.append(entry["step"])
        curve.losses.append(entry["loss"])
    return list(stages.values())


def _one_per_image(shots: Sequence[Shot], count: int) -> list[Shot]:
    first: dict[str, Shot] = {}
    for shot in shots:
        first.setdefault(str(shot.image), shot)
    return list(first.values())[:count]


def _evaluated(folder: Path) -> Evaluated:
    results = read_results(folder)
    metrics = {m["name"]: m for m in results["metrics"]}
    headline = metrics[results["headline"]]
    rows = next(iter(results["tables"].values()), [])
    return Evaluated(
        results=results,
        run=results["run"],
        accuracy=headline["value"] / headline["scale"],
        by_type={m["name"]: (m["questions"], m["value"] / m["scale"]) for m in rows},
        wrong=sum(v["credit"] != 1 for v in read_verdicts(folder)),
    )


def _rows(seen: Evaluated, blind: Evaluated | None) -> list[tuple[str, int, float, float | None]]:
    unseen = {} if blind is None else {kind: accuracy for kind, (_, accuracy) in blind.by_type.items()}
    rows = [(kind, count, accuracy, unseen.get(kind)) for kind, (count, accuracy) in seen.by_type.items()]
    return [
        *rows,
        ("all questions", seen.results["questions"], seen.accuracy, None if blind is None else blind.accuracy),
    ]


def _json(path: Path) -> Summary:
    return cast(Summary, json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
