"""Steps whose loss or gradient norm is no finite number: what they learnt from, and whether the stage goes on.

The numbers of a step stay on the device until a line of metrics.jsonl is due, so that no step waits for the host. A
step that is to be skipped changes nothing by itself (train/optim.py); here it is counted, and its records are listed in
nonfinite.jsonl, one line for each source: step, stage, source, records (their ids), loss and grad_norm (numbers, or the
texts "nan", "inf" and "-inf").
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tinyllava_fast import group
from tinyllava_fast.config.optim import OptimConfig
from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.errors import writing
from tinyllava_fast.log import log

FILE = "nonfinite.jsonl"
COUNTS = ("in_a_row", "nonfinite", "overflow", "since_line")
"""Of a stage: skipped steps up to now without a good one between them; of them all; steps that the scaling of the loss
in float16 left out; both since the last line of metrics.jsonl."""


@dataclass(frozen=True)
class _Waiting:
    """A step that the host has not seen. loss: this process's sum []; scale: one over its tokens. norm: []."""

    step: int
    loss: Tensor
    scale: float
    norm: Tensor
    records: dict[str, list[str]]


@dataclass(frozen=True)
class Outcome:
    """The numbers of a step. records: of this process, by source."""

    step: int
    loss: float
    norm: float
    records: dict[str, list[str]]

    @property
    def finite(self) -> bool:
        """Return whether the step was a step."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


@dataclass(frozen=True)
class Stop:
    """The step that the stage stops at. why: what is said besides; "": the step alone is reason enough."""

    outcome: Outcome
    why: str = ""


class Outcomes:
    """The steps of a stage since its last line. names: of its sources. counts: of COUNTS, the checkpoint's.

    scaled: the loss is scaled, so that gradients that overflow are no error. main: this process writes the file.
    """

    def __init__(
        self,
        run: Path,
        stage: str,
        names: Sequence[str],
        optim: OptimConfig,
        counts: dict[str, int],
        *,
        scaled: bool,
        main: bool,
    ) -> None:
        self.path = run / FILE
        self._stage, self._names, self._optim, self._scaled, self._main = stage, names, optim, scaled, main
        self.counts = counts
        for name in COUNTS:
            counts.setdefault(name, 0)
        self._waiting: list[_Waiting] = []

    @property
    def guards(self) -> bool:
        """Return whether a step that is no number has to change nothing."""
        return self._scaled or self._optim.on_nonfinite == "skip"

    def note(self, step: int, loss: Tensor, scale: float, norm: Tensor, micro: Sequence[PackedBatch]) -> None:
        """Keep the numbers of a step where they are. loss: this process's sum. micro: its packs."""
        records: dict[str, list[str]] = {}
        for batch in micro:
            sources = batch.sample_sources or [0] * len(batch.sample_ids)
            for source, name in zip(sources, batch.sample_ids, strict=True):
                records.setdefault(self._names[source], []).append(name)
        self._waiting.append(_Waiting(step, loss, scale, norm, records))

    def settle(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> list[Outcome]:
        """Return the steps since the last time: one copy from the device, one sum over processes."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return []
        sums = all_reduce_sum(torch.stack([one.loss for one in waiting])).tolist()
        norms = torch.stack([one.norm.to(waiting[0].norm.device) for one in waiting]).tolist()
        return [
            Outcome(one.step, loss * one.scale, norm, one.records)
            for one, loss, norm in zip(waiting, sums, norms, strict=True)
        ]

    def judge(self, outcomes: Sequence[Outcome]) -> Stop | None:
        """Count the steps and list the records of those that were no number. Every process calls it, with the same."""
        broken = [one for one in outcomes if not one.finite and not self._overflow(one)]
        if broken:
            self._list(broken)
        for one in outcomes:
            if one.finite:
                self.counts["in_a_row"] = 0
            elif self._overflow(one):
                self._count("overflow")
            elif self._optim.on_nonfinite == "fail":
                return Stop(one)
            else:
                self._count("in_a_row", "nonfinite")
                log.warning(
                    "step %d: loss %s, gradient norm %s: skipped; its records are listed in %s",
                    *(one.step, one.loss, one.norm, self.path),
                )
                if why := self._exceeded():
                    return Stop(one, why)
        return None

    def _overflow(self, one: Outcome) -> bool:
        return self._scaled and math.isfinite(one.loss) and not one.finite

    def _count(self, *names: str) -> None:
        for name in (*names, "since_line"):
            self.counts[name] += 1

    def _exceeded(self) -> str:
        for count, key, words in (
            ("in_a_row", "most_skipped_in_a_row", "steps in a row"),
            ("nonfinite", "most_skipped", "steps of the stage"),
        ):
            if self.counts[count] > (most := getattr(self._optim, key)):
                return f" in {self.counts[count]} {words}, more than optim.{key}: {most}"
        return ""

    def _list(self, broken: Sequence[Outcome]) -> None:
        """Append the records of steps, those of all processes, to the file."""
        parts = group.gather([one.records for one in broken])
        if not self._main:
            return
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            for number, one in enumerate(broken):
                facts = {"step": one.step, "stage": self._stage}
                numbers = {"loss": _plain(one.loss), "grad_norm": _plain(one.norm)}
                for source in self._names:
                    records = [name for part in parts for name in part[number].get(source, [])]
                    if records:
                        file.write(json.dumps({**facts, "source": source, "records": records, **numbers}) + "\n")


def _plain(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)
