"""What a report shows, gathered from a run folder. The HTML page and the picture both draw from this."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyllava_fast.eval.results import read_results, read_verdicts

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


@dataclass(frozen=True)
class ReportData:
    """Everything in a report. blind and summary are empty where the run has none."""

    title: str
    results: dict[str, Any]
    blind: dict[str, Any]
    summary: dict[str, Any]
    curves: list[Curve]
    shots: list[Shot]
    mistakes: list[Shot]
    config: str = ""
    note: str = ""
    rows: list[tuple[str, int, float, float | None]] = field(default_factory=list)
    """(type, questions, accuracy, blind accuracy) with a last row for all."""


def gather(
    run_dir: Path,
    results_dir: Path,
    blind_dir: Path | None,
    *,
    note: str = "",
    shots: int = 32,
    seed: int = 0,
) -> ReportData:
    """Collect a report's content.

    run_dir: folder of tlf-train (metrics.jsonl, summary.json, config.yaml; each optional). results_dir, blind_dir:
    folders of one benchmark, written by tlf-eval. note: a sentence about the data, for the reader. shots are a seeded
    random draw, one an image; mistakes a seeded draw among the wrong ones.
    Raises UserError if results_dir holds no finished evaluation.
    """
    results = _accuracies(results_dir)
    blind = _accuracies(blind_dir) if blind_dir is not None else {}
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
        results=results,
        blind=blind,
        summary=_json(run_dir / "summary.json"),
        curves=read_curves(run_dir / "metrics.jsonl"),
        shots=drawn,
        mistakes=mistakes,
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        note=note,
        rows=_rows(results, blind),
    )


def read_curves(path: Path) -> list[Curve]:
    """The loss of each stage from metrics.jsonl, in the order of training; [] if there is no such file."""
    stages: dict[str, Curve] = {}
    if not path.exists():
        return []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        curve = stages.setdefault(entry["stage"], Curve(entry["stage"], [], []))
        curve.steps.append(entry["step"])
        curve.losses.append(entry["loss"])
    return list(stages.values())


def _one_per_image(shots: Sequence[Shot], count: int) -> list[Shot]:
    first: dict[str, Shot] = {}
    for shot in shots:
        first.setdefault(str(shot.image), shot)
    return list(first.values())[:count]


def _accuracies(folder: Path) -> dict[str, Any]:
    """The results of a folder and its run, with the headline and its first breakdown as shares 0..1."""
    results = read_results(folder)
    metrics = {m["name"]: m for m in results["metrics"]}
    rows: list[dict[str, Any]] = next(iter(results["tables"].values()), [])
    return {
        **results,
        **results["run"],
        "accuracy": metrics[results["headline"]]["value"] / metrics[results["headline"]]["scale"],
        "accuracy_by_type": {m["name"]: m["value"] / m["scale"] for m in rows},
        "questions_by_type": {m["name"]: m["questions"] for m in rows},
        "wrong": sum(v["credit"] != 1 for v in read_verdicts(folder)),
    }


def _rows(results: dict[str, Any], blind: dict[str, Any]) -> list[tuple[str, int, float, float | None]]:
    unseen = blind.get("accuracy_by_type", {})
    rows = [
        (kind, results["questions_by_type"][kind], accuracy, unseen.get(kind))
        for kind, accuracy in results["accuracy_by_type"].items()
    ]
    return [*rows, ("all questions", results["questions"], results["accuracy"], blind.get("accuracy"))]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
