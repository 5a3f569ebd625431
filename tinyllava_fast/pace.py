"""The pace at which a long piece of work says how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable

EVERY_S = 10.0


class Pace:
    """Says when the next progress line is due: at most one every so many seconds.

    wait_s: seconds before the first one. every_s: seconds between two. clock: seconds, for tests.
    """

    def __init__(
        self, *, wait_s: float = 0.0, every_s: float = EVERY_S, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock, self._every_s = clock, every_s
        self.started = clock()
        self._next = self.started + wait_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since the work began."""
        return self._clock() - self.started

    def due(self, *, always: bool = False) -> bool:
        """Return True if a line is due now, and count it as said. always: it is, for a first or last line."""
        now = self._clock()
        if now < self._next and not always:
            return False
        self._next = now + self._every_s
        return True
