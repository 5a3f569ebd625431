"""The numbers of a run so far, thinned out to what a chart can show."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:  # tlf-train status is to answer at once, without torch
    from tinyllava_fast.train.metrics import Entry
    from tinyllava_fast.train.standing import Validation

MOST = 1500  # points of a series; then every second one goes


@dataclass
class Series:
    """Values over steps of the run, evenly thinned out: of a long run every n-th is kept."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    _every: int = 1
    _seen: int = 0

    def add(self, step: int, value: float | None) -> None:
        """Add a value, which may be dropped if there are many. What is no number is left out."""
        if value is None or not math.isfinite(value):
            return
        if self._seen % self._every == 0:
            self.steps.append(step)
            self.values.append(value)
        self._seen += 1
        if len(self.steps) > MOST:
            del self.steps[1::2], self.values[1::2]
            self._every *= 2


@dataclass
class History:
    """Series by what they are: ("loss", stage), ("validation loss", stage), ("lr", component), ("grad_norm", "").

    ends: last step of each stage so far. last: the newest entry. best: step and validation of each stage's best.
    """

    series: dict[tuple[str, str], Series] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    last: Entry | None = None
    best: dict[str, tuple[int, Validation]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> History:
        """Return what a metrics.jsonl holds; nothing of a file that is not there. A line cut short is left out."""
        history = cls()
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    try:
                        history.add(cast("Entry", json.loads(line)))
                    except (ValueError, KeyError, TypeError, AttributeError):
                        continue
        return history

    def add(self, entry: Entry) -> None:
        """Add a line of metrics.jsonl."""
        step, stage = entry["step"], entry["stage"]
        self._of("loss", stage).add(step, entry["loss"])
        for name, lr in entry.get("lr", {}).items():
            self._of("lr", name).add(step, lr)
        for name in ("grad_norm", "memory_bytes", "samples_per_s", "tokens_per_s"):
            if isinstance(value := entry.get(name), (int, float)):
                self._of(name, "").add(step, value)
        for component, norm in entry.get("grad_norms", {}).items():
            self._of("grad_norm", component).add(step, norm)
        if noise := entry.get("noise"):
            self._of("noise", "").add(step, noise["packs"])
        if ranks := entry.get("ranks"):
            self._of("idle", "").add(step, ranks["idle_share"])
        if found := entry.get("validation"):
            if "loss" in found:
                self._of("validation loss", stage).add(step, found["loss"])
            for name, score in found.get("scores", {}).items():
                self._of("score", name).add(step, score)
            if found.get("best"):
                self.best[stage] = step, found
        self.ends[stage] = step
        self.last = entry

    def of(self, kind: str) -> dict[str, Series]:
        """Return the series of a kind by their names, in the order in which they came up."""
        return {name: series for (held, name), series in self.series.items() if held == kind}

    def _of(self, kind: str, name: str) -> Series:
        return self.series.setdefault((kind, name), Series())
