"""Losses and counts of each source of a stage: for the lines of metrics.jsonl, and for the summary.

The sums of the segments come with the loss of a pack and stay on the device until a line is due. What has been counted
since the last line is part of a checkpoint, so that a resumed run writes the same lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from tinyllava_fast.data.types import PackedBatch

COUNTED = ("samples", "tokens", "supervised_tokens")


class SourceEntry(TypedDict):
    """A source in a line of metrics.jsonl: sums over the steps since the line before.

    loss: mean over its supervised tokens, those of skipped steps left out; None without any.
    """

    loss: float | None
    samples: int
    tokens: int
    supervised_tokens: int


class BySource:
    """The sources of a stage. names: of all of them; one or none are not told apart, and then nothing is done.

    window: name -> [loss sum, samples, tokens, supervised tokens, of them those whose loss is no number] since the last
    line, totals: name -> the counts since
    the stage began; both are changed in place, and are the checkpoint's.
    """

    def __init__(self, names: Sequence[str], window: dict[str, list[float]], totals: dict[str, dict[str, int]]) -> None:
        self.names = list(names) if len(names) > 1 else []
        self._window, self._totals = window, totals
        for name in self.names:
            sums = window.setdefault(name, [])
            sums += [0.0] * (2 + len(COUNTED) - len(sums))  # of a checkpoint from before a column existed
            totals.setdefault(name, dict.fromkeys(COUNTED, 0))
        self._pending: list[list[tuple[Tensor, list[int]]]] = []  # of each step: the packs' losses, and their sources
        self._counts: list[list[float]] = []  # of each step: the supervised tokens of each source

    def local(self, micro: Sequence[PackedBatch]) -> list[int]:
        """Return the counts of this process's packs of a step, source after source."""
        if not self.names:
            return []
        counts = np.zeros((len(self.names), len(COUNTED)), np.int64)
        for batch in micro:
            if batch.source_counts:
                counts += np.array(batch.source_counts)
        return [int(count) for count in counts.reshape(-1)]

    def begin(self, counts: Sequence[float]) -> None:
        """Begin a step. counts: what ``local`` returned, summed over all processes."""
        if not self.names:
            return
        self._pending.append([])
        self._counts.append(np.array(counts).reshape(len(self.names), -1)[:, -1].tolist())
        for name, row in zip(self.names, np.array(counts).reshape(len(self.names), -1).tolist(), strict=True):
            for column, count in enumerate(row):
                self._window[name][1 + column] += count
                self._totals[name][COUNTED[column]] += int(count)

    def note(self, losses: Tensor, batch: PackedBatch) -> None:
        """Keep the losses [1 + S] of a pack of the step, on its device."""
        if self.names and batch.segment_sources:
            self._pending[-1].append((losses[1:], batch.segment_sources))

    def settle(self, all_reduce_sum: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Add the losses of the steps so far to the window: one copy from the device, one sum over processes."""
        if not self._pending:
            return
        packs = [pack for step in self._pending for pack in step]
        rows = torch.stack([losses for losses, _ in packs]).double().cpu().numpy() if packs else np.zeros((0, 0))
        each = iter(rows)
        sums = np.zeros((len(self._pending), len(self.names)))
        for number, step in enumerate(self._pending):
            for _, owners in step:
                sums[number] += np.bincount(owners, next(each)[: len(owners)], minlength=len(self.names))
        steps, counts = all_reduce_sum(torch.from_numpy(sums).to(device)).tolist(), self._counts
        self._pending, self._counts = [], []
        for row, supervised in zip(steps, counts, strict=True):
            for name, loss, tokens in zip(self.names, row, supervised, strict=True):
                broken = not math.isfinite(loss)  # of a step that was skipped
                self._window[name][-1 if broken else 0] += tokens if broken else loss

    def entries(self) -> dict[str, SourceEntry]:
        """Return each source's part of the line that is due, after ``settle``."""
        found: dict[str, SourceEntry] = {}
        for name in self.names:
            loss, samples, tokens, supervised, unknown = self._window[name]
            found[name] = {
                "loss": loss / (supervised - unknown) if supervised > unknown else None,
                "samples": int(samples),
                "tokens": int(tokens),
                "supervised_tokens": int(supervised),
            }
        return found

    def clear(self) -> None:
        """Begin a new line."""
        for sums in self._window.values():
            sums[:] = [0.0] * len(sums)
