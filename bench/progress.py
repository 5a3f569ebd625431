"""Lines on standard error that say how far a benchmark is, written between what is timed and never beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from tinyllava_fast.log import log
from tinyllava_fast.pace import EVERY_S, Pace

T = TypeVar("T")


def progress(items: Sequence[T], label: str, every: float = EVERY_S) -> Iterator[T]:
    """Yield the items; say what begins, how many are done, items a minute and the seconds left.

    label: what an item is, in the plural. every: seconds between lines. Nothing is written while an item is worked on.
    """
    pace = Pace(wait_s=every, every_s=every)
    log.info("%s: %d to do", label, len(items))
    for done, item in enumerate(items, 1):
        yield item
        if pace.due():
            rate = done / pace.elapsed_s
            left = (len(items) - done) / rate
            log.info("%s: %d/%d, %.1f a minute, %.0f s left", label, done, len(items), 60 * rate, left)
