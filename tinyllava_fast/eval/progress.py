"""The progress line of an evaluation: a live bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tinyllava_fast.log import log
from tinyllava_fast.pace import Pace

T = TypeVar("T")
LINE_EVERY_S = 30.0


def progress(
    items: Iterable[T], *, total: int, done: int = 0, label: str = "questions", last: bool = True
) -> Iterator[T]:
    """Yield the items while showing how many of ``total`` are done, items/s and the time left.

    done: how many had been finished before; they count as done but not in the rate. last: log a line at the end even if
    that comes before the first one is due.
    """
    if sys.stderr.isatty() and log.isEnabledFor(logging.INFO):  # one bar, not one of each rank
        return _bar(items, total, done, label)
    return _lines(items, total, done, label, last)


def _bar(items: Iterable[T], total: int, done: int, label: str) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, completed=done, rate="")
        start = time.monotonic()
        for n, item in enumerate(items, 1):
            yield item
            bar.update(task, advance=1, rate=f"{n / (time.monotonic() - start + 1e-9):.1f} {label}/s")


def _lines(items: Iterable[T], total: int, done: int, label: str, last: bool) -> Iterator[T]:
    pace = Pace(wait_s=LINE_EVERY_S, every_s=LINE_EVERY_S, clock=time.monotonic)
    for n, item in enumerate(items, 1):
        yield item
        if pace.due(always=last and done + n == total):
            rate = n / (pace.elapsed_s + 1e-9)
            left = (total - done - n) / rate
            log.info("%d/%d %s, %.1f %s/s, %.0f s left", done + n, total, label, rate, label, left)
