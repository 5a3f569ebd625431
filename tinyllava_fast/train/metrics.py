"""Reports of a run: metrics.jsonl and what its loggers show, one entry every ``log_every`` steps.

``loss`` of an entry is the mean over the steps since the entry before, each step's loss being its mean over supervised
tokens; the other numbers are rates over the same steps, or, as grad_norm and lr, those of the last of them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, cast

import torch

from tinyllava_fast.errors import UserError, writing
from tinyllava_fast.hardware import rss_bytes
from tinyllava_fast.log import log
from tinyllava_fast.recipes.rates import LORA_B
from tinyllava_fast.train.answers import SampleRow
from tinyllava_fast.train.by_source import SourceEntry
from tinyllava_fast.train.loggers.base import LOGGERS, Logged
from tinyllava_fast.train.noise import NoiseEntry
from tinyllava_fast.train.standing import Validation
from tinyllava_fast.train.stragglers import RanksEntry

COUNTS = ("samples", "tokens", "supervised_tokens", "capacity")
"""Sums over ranks of a step: samples, real tokens, supervised tokens, token budget (real tokens + unused tail)."""


class Rates(TypedDict):
    """Means of a few steps. padding_share: of the token budget. data_wait_share: of the time."""

    samples_per_s: float
    tokens_per_s: float
    supervised_tokens_per_s: float
    padding_share: float
    data_wait_share: float
    step_s: float


class Line(Rates):
    """What every line of metrics.jsonl has. lr: see ``shown_rates``.

    loss: None if that of no step is a number (optim.on_nonfinite: skip). grad_norm: None if the last step's is none.
    """

    step: int
    stage: str
    loss: float | None
    lr: dict[str, float]
    grad_norm: float | None
    epoch: float
    memory_bytes: int


class Entry(Line, total=False):
    """A line of metrics.jsonl.

    sources: by name, where there are several. validation: what followed the step, which then has a line in any case.
    grad_norms: by component, where several train. skipped_steps: since the line before, where steps may be skipped.
    loss_scale: in float16. noise: with optim.noise_scale.
    ranks: of several processes, under an engine that can tell.
    """

    grad_norms: dict[str, float]
    skipped_steps: int
    loss_scale: float
    noise: NoiseEntry
    sources: dict[str, SourceEntry]
    ranks: RanksEntry
    validation: Validation


def shown_rates(lrs: Mapping[str, float]) -> dict[str, float]:
    """Return the largest rate of each component, and apart from it that of LoRA's B where it differs.

    lrs: of groups, named as in recipes/rates.py: "llm", "llm.layer3.no_decay", "llm.lora_b".
    """
    found: dict[str, float] = {}
    for name, lr in lrs.items():
        words = name.split(".")
        key = f"{words[0]}.{LORA_B}" if LORA_B in words else words[0]
        found[key] = max(lr, found.get(key, 0.0))
    return found


def memory_bytes(device: torch.device) -> int:
    """Memory in use: allocated on the GPU, else resident in this process."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else rss_bytes()


def peak_device_bytes(device: torch.device) -> int:
    """Largest memory that torch has allocated on a GPU; 0 on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


@dataclass
class Window:
    """Sums since the last log line; rates are taken over it."""

    started: float = field(default_factory=time.perf_counter)
    wait_s: float = 0.0
    """Time spent waiting for data."""
    steps: int = 0
    own: list[float] = field(default_factory=list)
    """Seconds of each step that this process did not spend in collectives."""
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0.0))

    def add(self, counts: dict[str, float], wait_s: float, own_s: float) -> None:
        """Add one step's counts (all ranks) and this process's time: waiting for data, and outside of collectives."""
        self.steps += 1
        self.own.append(own_s)
        self.wait_s += wait_s
        for name in COUNTS:
            self.counts[name] += counts[name]

    def rates(self) -> Rates:
        """Return the means of the steps so far."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        capacity = max(self.counts["capacity"], 1.0)
        return {
            "samples_per_s": self.counts["samples"] / elapsed,
            "tokens_per_s": self.counts["tokens"] / elapsed,
            "supervised_tokens_per_s": self.counts["supervised_tokens"] / elapsed,
            "padding_share": 1.0 - self.counts["tokens"] / capacity,
            "data_wait_share": min(self.wait_s / elapsed, 1.0),
            "step_s": elapsed / max(self.steps, 1),
        }


class MetricsWriter:
    """Appends to <run>/metrics.jsonl and tells the loggers. after_step: entries of later steps are dropped first.

    loggers: registered names. config: the run's, for them. UserError where a file cannot be written, or where
    metrics.jsonl has been removed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        after_step: int = 0,
        loggers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, object] | None = None,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            truncate_after(self.path, after_step)
            self._file = self.path.open("a", encoding="utf-8")
        run = Logged(folder, config or {}, after_step)
        with writing(folder):
            self._loggers = [LOGGERS.get(name, "loggers")(run) for name in loggers]

    def write(self, entry: Entry) -> None:
        """Append an entry to metrics.jsonl and show its numbers."""
        if not self.path.exists():
            raise UserError(
                f"{self.path}: has been removed while this run writes to it; do not remove the folder of a run that "
                "trains, and run the same command again"
            )
        with writing(self.path):
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        numbers = _numbers(entry)
        for logger in self._loggers:
            with writing(self.path.parent):
                logger.write(entry["stage"], entry["step"], numbers)

    def samples(self, stage: str, step: int, rows: Sequence[SampleRow]) -> None:
        """Show what the model answers to the samples."""
        for logger in self._loggers:
            with writing(self.path.parent):
                logger.samples(stage, step, rows)

    def sync(self) -> None:
        """fsync: before a checkpoint is published, its steps are on disk."""
        with writing(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close all. A full disk is a warning now: whatever matters has been written before."""
        for close in (self._file.close, *(logger.close for logger in self._loggers)):
            try:
                close()
            except OSError as error:
                log.warning("%s: closing failed: %s", self.path.parent, error.strerror or error)


def truncate_after(path: Path, step: int) -> None:
    """Cut metrics.jsonl behind the last whole line of a step <= ``step``: a resumed run repeats the later ones."""
    if not path.is_file():
        return
    keep = 0
    with path.open("rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break  # the line that kill -9 cut short
            keep += len(line)
    os.truncate(path, keep)


def _numbers(entry: Entry) -> dict[str, float]:
    """Return the numbers of an entry by the names that loggers show them under."""
    found = {f"lr/{group}": lr for group, lr in entry["lr"].items()}
    found |= {f"train/{k}": v for k, v in entry.items() if k != "step" and isinstance(v, (int, float))}
    found |= {f"grad_norm/{component}": norm for component, norm in entry.get("grad_norms", {}).items()}
    found |= {f"noise/{k}": v for k, v in entry.get("noise", {}).items() if isinstance(v, (int, float))}
    for source, numbers in entry.get("sources", {}).items():
        found |= {f"source/{source}/{k}": v for k, v in numbers.items() if isinstance(v, (int, float))}
    found |= {f"ranks/{k}": float(cast(float, v)) for k, v in entry.get("ranks", {}).items()}
    validation = entry.get("validation", Validation())
    found |= {f"validation/{k}": v for k, v in validation.items() if isinstance(v, (int, float))}
    return found | {f"validation/{name}": score for name, score in validation.get("scores", {}).items()}
