"""Sequences that come one by one: who is next, and how much of whose prompt a pass computes.

While others generate, the next tokens of one or two newcomers' prompts ride in the steps of decoding: all weights are
read once for both, so a step takes less than twice as long. When more wait, prompts are computed in chunks, one between
two steps, as long as one step for each request that waits for its first token, since then the throughput is what
everybody waits for.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from tinyllava_fast.infer.scheduling.prefixes import Kept, PrefixCache
from tinyllava_fast.infer.scheduling.sequence import Sequence, Status

LEAST_CHUNK = 8  # fewer take hardly less time, in a pass of their own or as riders, and a prompt has to come to its end
MOST_RIDERS = 32
RIDE = 0.6  # of the time of a step is what riders may add to it
MOST_RIDES = 16  # one after the other
FEW = 2  # newcomers whose prompts ride; when more wait, chunks are computed
FIRST_CHUNK = 64  # while it is not known how long passes take
NEWS = 0.3  # weight of the last pass in the averages


@dataclass
class Pace:
    """Moving averages of the time that passes take. chunk_tokens: a fixed size of chunks, which needs no times."""

    chunk_tokens: int | None = None
    step_seconds: float = 0.0
    step_rows: int = 0  # of the last step without riders
    token_seconds: float = 0.0  # of a token of a prompt
    rider_seconds: float = 0.0  # of one that rides
    rides: int = 0  # since the last step without riders

    def stepped(self, rows: int, seconds: float) -> None:
        """Note a step of decoding."""
        again = _alike(rows, self.step_rows)
        self.step_seconds, self.step_rows = _average(self.step_seconds if again else 0.0, seconds), rows
        self.rides = 0

    def rode(self, riders: int, seconds: float) -> None:
        """Note a step of decoding with riders."""
        self.rides += 1
        if riders:
            least = 1e-3 * self.step_seconds
            self.rider_seconds = _average(self.rider_seconds, max(least, seconds - self.step_seconds) / riders)

    def riders(self, decoding: int, newcomers: int, most: int) -> int:
        """Return how many tokens of prompts ride in the next step of so many sequences; 0 where chunks are better."""
        if self.chunk_tokens is not None:
            return self.chunk_tokens if self.chunk_tokens <= most else 0
        if not 0 < newcomers <= FEW or not decoding:
            return 0
        if not self.rider_seconds or not self.step_seconds:
            return min(LEAST_CHUNK, most)
        return min(most, max(LEAST_CHUNK, int(RIDE * self.step_seconds / self.rider_seconds)))

    def knows(self, decoding: int) -> bool:
        """Return whether it knows how long a step of about so many sequences takes; now and then it looks again."""
        return self.chunk_tokens is not None or (self.rides < MOST_RIDES and _alike(decoding, self.step_rows))

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

    def __init__(self, prefixes: PrefixCache) -> None:
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

        most: sequences that may be added. Who begins as one of them does waits for the next pass: then it can share
        what this one computes.
        """
        parts: list[tuple[Sequence, int]] = []
        later: list[tuple[int, int, Sequence]] = []

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
                content = sequence.content()
                kept, length = self.prefixes.longest(content)
                if _begins_alike(content, [s for s, _ in parts], length + LEAST_CHUNK):
                    later.append(heappop(self._waiting))
                    continue
                if not self._admit(sequence, content, kept, length):
                    break
                self._prefilling.append(sequence)
                most = None if most is None else most - 1
                take(sequence)
            heappop(self._waiting)
        for item in later:
            heappush(self._waiting, item)
        whole = {sequence for sequence, stop in parts if stop == sequence.num_tokens}
        self._prefilling = [s for s in self._prefilling if s not in whole]
        return parts

    def _admit(self, sequence: Sequence, content: list[int], kept: Kept | None, length: int) -> bool:
        """Give a sequence rows, and in them what is there already of its prompt; False if it has to wait."""
        length = min(length, len(content) - 1)  # what predicts the next token is computed in any case
        if not self.prefixes.place(sequence, content, kept, length):
            return False
        sequence.status = Status.RUNNING
        if not sequence.tokens:
            sequence.num_reused_tokens = sequence.num_cached_tokens
        return True


def _begins_alike(content: list[int], others: list[Sequence], least: int) -> bool:
    """Return whether one of the others begins with the first ``least`` tokens, or more."""
    start = content[:least]
    return len(start) == least and any(other.content()[:least] == start for other in others)


def _alike(rows: int, others: int) -> bool:
    return 3 * others <= 4 * rows <= 5 * others


def _average(old: float, new: float) -> float:
    return new if not old else (1 - NEWS) * old + NEWS * new
