"""Sequences that come one by one: who is next, and how much of whose prompt a pass computes.

While others generate, prompts are computed in chunks, one between two steps of decoding, as long as one step for each
request that waits for its first token: a newcomer doubles the time between two tokens of the others, and when many
wait, chunks are large, since then the throughput is what everybody waits for.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from tinyllava_fast.infer.scheduling.pool import KVPool
from tinyllava_fast.infer.scheduling.prefixes import PrefixCache
from tinyllava_fast.infer.scheduling.sequence import Sequence, Status, num_common_tokens

LEAST_CHUNK = 8  # a pass over fewer tokens takes hardly less time: all weights are read
FIRST_CHUNK = 64  # while it is not known how long passes take
NEWS = 0.3  # weight of the last pass in the averages


@dataclass
class Pace:
    """Moving averages of the time that passes take. chunk_tokens: a fixed size of chunks, which needs no times."""

    chunk_tokens: int | None = None
    step_seconds: float = 0.0
    token_seconds: float = 0.0  # of a token of a prompt

    def stepped(self, seconds: float) -> None:
        """Note a step of decoding."""
        self.step_seconds = _average(self.step_seconds, seconds)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """Note a pass over prompts, images not counted."""
        if tokens:
            self.token_seconds = _average(self.token_seconds, seconds / tokens)

    def chunk(self, backlog: int) -> int:
        """Return the tokens of a chunk that takes as long as ``backlog`` steps."""
        if self.chunk_tokens is not None:
            return self.chunk_tokens
        if not self.step_seconds or not self.token_seconds:
            return FIRST_CHUNK
        return max(LEAST_CHUNK, int(backlog * self.step_seconds / self.token_seconds))


class OnlineQueue:
    """Those that wait, by priority and then by arrival, and those whose prompts are being computed."""

    def __init__(self, pool: KVPool, prefixes: PrefixCache) -> None:
        self.pool = pool
        self.prefixes = prefixes
        self._waiting: list[tuple[int, int, Sequence]] = []
        self._numbers = count()
        self._prefilling: list[Sequence] = []

    def __len__(self) -> int:
        """Return how many wait or are being prefilled."""
        return self.num_waiting + len(self._prefilling)

    @property
    def num_waiting(self) -> int:
        """Those that have no rows yet."""
        return sum(not s.ended for *_, s in self._waiting)

    def add(self, sequence: Sequence, *, first: bool = False) -> None:
        """Let a sequence wait. first: before all others of its priority, as one that had begun."""
        number = next(self._numbers)
        heappush(self._waiting, (sequence.request.priority, -number if first else number, sequence))

    def drop_ended(self) -> None:
        """Forget those that have ended."""
        self._waiting = sorted(item for item in self._waiting if not item[2].ended)
        self._prefilling = [s for s in self._prefilling if not s.ended]

    def send_back(self, sequence: Sequence) -> None:
        """Let a sequence that has rows wait again; they are kept in case nobody needs them before it goes on."""
        self._prefilling = [s for s in self._prefilling if s is not sequence]
        self.prefixes.release(sequence)
        sequence.status = Status.WAITING
        self.add(sequence, first=True)

    def next_parts(self, room: int, most: int | None) -> list[tuple[Sequence, int]]:
        """Return sequences and how far to compute each, ``room`` tokens in all; those that are new have rows by now.

        most: sequences that may be added.
        """
        parts: list[tuple[Sequence, int]] = []

        def take(sequence: Sequence) -> None:
            nonlocal room
            first = sequence.num_cached_tokens
            stop = min(sequence.num_tokens, first + room)
            room -= stop - first
            parts.append((sequence, stop))

        for sequence in self._prefilling:
            if room > 0:
                take(sequence)
        while room > 0 and self._waiting and (most is None or most > 0):
            sequence = self._waiting[0][2]
            if not sequence.ended:
                if not self._admit(sequence, [s for s, _ in parts]):
                    break
                self._prefilling.append(sequence)
                most = None if most is None else most - 1
                take(sequence)
            heappop(self._waiting)
        whole = {sequence for sequence, stop in parts if stop == sequence.num_tokens}
        self._prefilling = [s for s in self._prefilling if s not in whole]
        return parts

    def _admit(self, sequence: Sequence, beside: list[Sequence]) -> bool:
        """Give a sequence rows, and in them what is there already of its prompt; False if it has to wait.

        beside: sequences of the pass that is being made. If one of them is about to compute what this one could copy
        from it later, it waits.
        """
        content = sequence.content()
        kept, length = self.prefixes.longest(content)
        soon = max((num_common_tokens(content, other.content(), len(content)) for other in beside), default=0)
        if soon >= length + LEAST_CHUNK:
            return False
        length = min(length, len(content) - 1)  # what predicts the next token is computed in any case
        rows = sequence.first_rows
        start = self.pool.rows.take(rows)
        if start is None:
            return False
        if kept is None or not self.prefixes.holds(kept):  # its rows may have been needed
            length = 0
        else:
            self.pool.move(kept.first_row, start, length)
        sequence.start, sequence.num_reserved_rows = start, rows
        sequence.num_cached_tokens, sequence.status = length, Status.RUNNING
        if not sequence.tokens:
            sequence.num_reused_tokens = length
        self.prefixes.watch(sequence, content)
        return True


def _average(old: float, new: float) -> float:
    return new if not old else (1 - NEWS) * old + NEWS * new
