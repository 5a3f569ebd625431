"""The live progress line on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from tinyllava_fast.log import log
from tinyllava_fast.pace import Pace

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from tinyllava_fast.train.metrics import Entry

_FIELDS = (
    "loss {loss_text} · {samples_per_s:.1f} samples/s · {tokens_per_s:.0f} tok/s · "
    "{supervised_tokens_per_s:.0f} supervised tok/s · {memory_gb:.2f} GB"
)


def format_seconds(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    whole = max(int(seconds), 0)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Progress:
    """Shows one stage: on a terminal always, elsewhere a line at most every ten seconds, and the first and last one.

    total_steps: of the stage; done: steps finished before this process started it. later: what the stages to come will
    take, in steps of this one.
    """

    def __init__(self, stage: str, total_steps: int, *, done: int = 0, later: float = 0.0, show: bool = True) -> None:
        self._stage, self._total, self._done, self._later = stage, total_steps, done, later
        self._pace = Pace()
        self._started, self._first = time.perf_counter(), done
        self._live: Bar | None = None
        self._validated = ""
        if show and sys.stderr.isatty():
            self._live = _bar()
            self._task = self._live.add_task(stage, total=total_steps, completed=done, text="first step ...")
            self._live.start()
        self._show = show

    def advance(self, stage_step: int) -> None:
        """Count a step as done; its numbers are not asked for, which would wait for the device."""
        self._done = stage_step
        if self._live is not None:
            self._live.update(self._task, completed=stage_step)

    def update(self, stage_step: int, entry: Entry, *, line: bool) -> None:
        """Show an entry of the metrics. line: whether a plain log line is due (on a terminal the bar always moves)."""
        self._done = stage_step
        if not self._show:
            return
        loss = "no number" if entry["loss"] is None else f"{entry['loss']:.4f}"
        text = _FIELDS.format(**entry, loss_text=loss, memory_gb=entry["memory_bytes"] / 1e9)
        if skipped := entry.get("skipped_steps"):
            text += f" · {skipped} skipped"
        if "loss" in (found := entry.get("validation", {})):
            self._validated = f" · validation loss {found['loss']:.4f}"
        text += self._validated
        if self._live is not None:
            self._live.update(self._task, completed=stage_step, text=f"{text}{self._run_eta()}")
        elif line and self._pace.due(always=stage_step == self._total):
            eta = f"ETA {format_seconds(self.eta_s())}"
            log.info("%s %d/%d · %s · %s%s", self._stage, stage_step, self._total, text, eta, self._run_eta())

    def eta_s(self) -> float:
        """Seconds to the end of the stage at this process's mean speed."""
        return self.step_s() * (self._total - self._done)

    def _run_eta(self) -> str:
        return f" · run ETA {format_seconds(self.run_eta_s())}" if self._later else ""

    def run_eta_s(self) -> float:
        """Seconds to the end of the run, later stages reckoned by their FLOPs at this one's speed."""
        return self.eta_s() + self.step_s() * self._later

    def step_s(self) -> float:
        """Return the seconds of a step so far, on average; 0 before the first one."""
        spent, steps = time.perf_counter() - self._started, self._done - self._first
        return spent / steps if steps else 0.0

    def close(self) -> None:
        """Leave the line as it is."""
        if self._live is not None:
            self._live.stop()


def _bar() -> Bar:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("[bold]{task.description}"),
        progress.MofNCompleteColumn(),
        progress.BarColumn(bar_width=20),
        progress.TextColumn("{task.fields[text]}"),
        progress.TextColumn("ETA"),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
