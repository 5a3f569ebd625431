"""How far a benchmark is: a line on standard error now and then, written between what is timed and never beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tinyllava_fast.log import log

T = TypeVar("T")
LINE_EVERY_S = 10.0


def progress(items: Sequence[T], label: str, every: float = LINE_EVERY_S) -> Iterator[T]:
    """Yield the items; say what begins, how many are done, items a minute and the seconds left.

    label: what an item is, in the plural. every: seconds between lines. Nothing is written while an item is worked on.
    """
    start = said = time.monotonic()
    log.info("%s: %d to do", label, len(items))
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said >= every:
            said, rate = now, done / (now - start)
            left = (len(items) - done) / rate
            log.info("%s: %d/%d, %.1f a minute, %.0f s left", label, done, len(items), 60 * rate, left)
