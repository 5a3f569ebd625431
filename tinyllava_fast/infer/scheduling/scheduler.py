"""The next pass: a prefill of waiting sequences while the pool has room, else a token for each that runs.

When a pass runs out of memory the batch shrinks and the sequences go on: after a prefill its token budget halves, after
a step the number of sequences in flight does; what was in the pass returns to the front of the queue with the tokens it
has generated, and a warning says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tinyllava_fast.infer.scheduling.admission import (
    admit,
    group_sequences,
    grow,
    halve,
    release,
    requeue,
    without_ended,
)
from tinyllava_fast.infer.scheduling.online import MOST_RIDERS, OnlineQueue, Pace
from tinyllava_fast.infer.scheduling.pool import KVPool
from tinyllava_fast.infer.scheduling.prefixes import PrefixCache
from tinyllava_fast.infer.scheduling.sequence import Group, NoRoomError, Sequence, Status
from tinyllava_fast.log import log


@dataclass
class Limits:
    """The most that a pass may hold; shrinks when memory runs out, for as long as the engine lives."""

    prefill_tokens: int
    riders: int = MOST_RIDERS
    sequences: int | None = None  # None: as many as the pool has rows for


@dataclass
class Scheduled:
    """The work of one pass.

    sequences: ascending by their first row. stops: of a prefill how many tokens of each the model has seen then; none:
    one token each. groups: those of which the shared tokens come first. riders: of a step of decoding, how many of its
    tokens are of prompts; it has stops, too.
    """

    sequences: list[Sequence]
    stops: list[int] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    riders: int = 0

    @staticmethod
    def step(decoding: Iterable[Sequence], riding: Iterable[tuple[Sequence, int]] = ()) -> Scheduled:
        """Return the step of the sequences that decode, and of others up to their stops beside them."""
        parts = [*((s, s.num_tokens) for s in decoding), *riding]
        riders = sum(stop - s.num_cached_tokens for s, stop in riding)
        scheduled = Scheduled.prefill(parts)
        return (
            Scheduled(scheduled.sequences, scheduled.stops, riders=riders) if riders else Scheduled(scheduled.sequences)
        )

    @staticmethod
    def prefill(parts: Iterable[tuple[Sequence, int]], groups: list[Group] | None = None) -> Scheduled:
        """Return the pass over sequences up to their stops."""
        ordered = sorted(parts, key=lambda part: part[0].start)
        return Scheduled([s for s, _ in ordered], [stop for _, stop in ordered], groups or [])

    @property
    def num_tokens(self) -> int:
        """Tokens of a prefill, those that groups share counted once."""
        alone = sum(stop - s.num_cached_tokens for s, stop in zip(self.sequences, self.stops, strict=True))
        return alone + sum(g.num_shared_tokens for g in self.groups)

    def parts(self) -> Iterator[tuple[Sequence, int, int]]:
        """Yield each sequence of a prefill with the range of its tokens, shared ones included, that are computed."""
        for sequence, stop in zip(self.sequences, self.stops, strict=True):
            yield sequence, sequence.num_cached_tokens if sequence.online else 0, stop

    def drop_ended(self) -> None:
        """Leave out the sequences that have ended, and the groups that have no other."""
        if self.stops:
            rest = [(s, stop) for s, stop in zip(self.sequences, self.stops, strict=True) if not s.ended]
            self.sequences, self.stops = [s for s, _ in rest], [stop for _, stop in rest]
        else:
            self.sequences = [s for s in self.sequences if not s.ended]
        self.groups = [g for g in self.groups if not all(m.ended for m in g.members)]


class Scheduler:
    """Holds the sequences of an engine: those that wait, and those that run on the rows of its pool.

    window: how many waiting sequences are grouped together. max_group_rows: most rows that a group begins with.
    share_prefix: whether sequences share the K/V of the beginning of their prompts. reuse: whether online ones start
    from the K/V of others that begin alike. chunk_tokens: see Pace.
    """

    def __init__(
        self,
        pool: KVPool,
        limits: Limits,
        *,
        window: int,
        max_group_rows: int,
        share_prefix: bool,
        reuse: bool = True,
        chunk_tokens: int | None = None,
    ) -> None:
        self.pool = pool
        self.limits = limits
        self.window = window
        self.max_group_rows = max_group_rows
        self.share_prefix = share_prefix
        self.pace = Pace(chunk_tokens)
        self.prefixes = PrefixCache(pool, share=share_prefix, reuse=reuse)
        self._online = OnlineQueue(self.prefixes)
        self._arrived: list[Sequence] = []  # not grouped yet
        self._waiting: list[Group] = []
        self._running: list[Sequence] = []
        self._ended: list[Sequence] = []  # before they ran
        self._filling = False  # the last pass was a prefill of groups, and there may be room for another
        self._chunked = False  # the last pass was one of online prompts

    @property
    def idle(self) -> bool:
        """Return whether it holds no sequence at all."""
        return not (self._arrived or self._waiting or self._running or self._ended or len(self._online))

    @property
    def num_waiting(self) -> int:
        """Sequences that have no rows yet."""
        return len(self._arrived) + sum(len(g.members) for g in self._waiting) + self._online.num_waiting

    @property
    def num_running(self) -> int:
        """Sequences that have rows."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Take a sequence in. One that has failed already comes out of the next ``collect``."""
        if sequence.online and not sequence.ended:
            self._online.add(sequence)
        else:
            (self._ended if sequence.ended else self._arrived).append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence, unless it has ended; the next ``collect`` frees its rows."""
        if sequence.ended:
            return
        if sequence.status is Status.WAITING:
            self._ended.append(sequence)
        sequence.abort()

    def fail(self, sequence: Sequence, error: BaseException) -> None:
        """End a sequence with an error, unless it has ended; the next ``collect`` frees its rows."""
        if sequence.ended:
            return
        if sequence.status is Status.WAITING:
            self._ended.append(sequence)
        sequence.fail(error)

    def wants_more(self) -> bool:
        """Return whether the next pass could prefill more than what waits. A long queue need not be read before."""
        if self._ended or not self._has_room():
            return False
        return self._group_arrived() > 0

    def schedule(self) -> Scheduled | None:
        """Choose the next pass; None if nothing can run."""
        decoding = sum(s.decodes for s in self._running)
        riders = self.pace.riders(decoding, len(self._online), self.limits.riders) if decoding else 0
        parts = [] if riders or (self._chunked and decoding) else self._online_parts(decoding)
        self._chunked = bool(parts)
        if parts:
            return Scheduled.prefill(parts)
        if self._has_room():
            self._group_arrived()
            groups = admit(self._waiting, self.pool.rows, self.limits.prefill_tokens, self._most_new())
            self._filling = bool(groups)
            if groups:
                members = [m for g in groups for m in g.members]
                self._running += members
                return Scheduled.prefill([(m, m.num_tokens) for m in members], groups)
        self._make_room()
        sequences = [s for s in self._running if s.decodes]
        if riders and self.pace.knows(len(sequences)):
            parts = self._next_parts(riders)
            riding = {s for s, _ in parts}  # one that was sent back may need no more than its newest token
            sequences = [s for s in sequences if s not in riding]
        return Scheduled.step(sequences, parts) if sequences or parts else None

    def collect(self) -> list[Sequence]:
        """Take out the sequences that have ended since the last call. Their rows are free."""
        before, self._ended = self._ended, []
        if before:
            self._arrived = [s for s in self._arrived if not s.ended]
            self._waiting = [g for group in self._waiting if (g := without_ended(group)) is not None]
        ended = [s for s in self._running if s.ended]
        if any(s.online for s in (*before, *ended)):
            self._online.drop_ended()
        if ended:
            self._running = [s for s in self._running if not s.ended]
            for sequence in ended:
                if sequence.online:
                    self.prefixes.release(sequence, keep=sequence.error is None)
                else:
                    release(sequence, self.pool.rows)
        for sequence in (*before, *ended):
            sequence.group = None  # the two refer to each other: a long queue would wait for the collector
        return before + ended

    def shrink(self, scheduled: Scheduled, error: BaseException) -> None:
        """Make passes smaller after one that ran out of memory, and let its sequences wait for another.

        A sequence that was alone in the pass fails with NoRoomError.
        """
        scheduled.drop_ended()
        if scheduled.riders and any(s.decodes for s in scheduled.sequences):
            self.limits.riders = 0
            self._send_back([s for s in scheduled.sequences if not s.decodes])
            log.warning(
                "out of memory in a step with %d tokens of prompts: they do not ride any more", scheduled.riders
            )
        elif scheduled.stops:
            self._shrink_prefill(scheduled, error)
        elif scheduled.sequences:
            self._shrink_step(scheduled.sequences, error)

    def _has_room(self) -> bool:
        """Return whether it is time for prefills: a pool half full is worth filling, a fuller one decodes first."""
        rows = self.pool.rows
        return self._filling or not self._running or (rows.free_rows + self.prefixes.num_rows) * 2 >= rows.size

    def _online_parts(self, decoding: int) -> list[tuple[Sequence, int]]:
        """Online sequences and how far to compute each in the next pass, between two steps of ``decoding`` others."""
        if not len(self._online):
            return []
        room = self.limits.prefill_tokens
        if decoding:
            room = min(room, self.pace.chunk(len(self._online)))
        return self._next_parts(room)

    def _next_parts(self, room: int) -> list[tuple[Sequence, int]]:
        parts = self._online.next_parts(room, self._most_new())
        known = set(self._running)
        self._running += [s for s, _ in parts if s not in known]
        return parts

    def _group_arrived(self) -> int:
        """Group what has arrived until enough for one prefill waits; return how many tokens are missing to that."""
        room = self.limits.prefill_tokens - sum(g.num_prefill_tokens for g in self._waiting)
        while room > 0 and self._arrived:
            part, self._arrived = self._arrived[: self.window], self._arrived[self.window :]
            groups = group_sequences(part, max_rows=self.max_group_rows, share_prefix=self.share_prefix)
            self._waiting += groups
            room -= sum(g.num_prefill_tokens for g in groups)
        return room

    def _most_new(self) -> int | None:
        limit = self.limits.sequences
        return None if limit is None else limit - len(self._running)

    def _make_room(self) -> None:
        """Rows for the next token of each sequence; those that started last go back to the queue if there are none."""
        full = [s for s in self._running if s.decodes and s.num_own_cached >= s.num_reserved_rows]
        for sequence in full:
            while sequence.status is Status.RUNNING and not grow(sequence, self.pool):
                self._send_back(self._running[-1:])

    def _send_back(self, sequences: list[Sequence]) -> None:
        gone = set(sequences)
        self._running = [s for s in self._running if s not in gone]
        for sequence in [s for s in sequences if s.online][::-1]:  # each goes before all others
            self._online.send_back(sequence)
        self._waiting[:0] = requeue([s for s in sequences if not s.online], self.pool.rows)

    def _shrink_prefill(self, scheduled: Scheduled, error: BaseException) -> None:
        groups, members, tokens = scheduled.groups, scheduled.sequences, scheduled.num_tokens
        if len(members) == 1 and not (members[0].online and tokens > 1):
            where = f"a pass of {tokens} tokens, which cannot be split"
            _out_of_memory(members[0], where, ", or shorten the prompt", error)
            return
        self.limits.prefill_tokens = max(1, min(self.limits.prefill_tokens, tokens) // 2)
        self._send_back(members)
        if len(groups) == 1 and len(members) > 1:
            self._waiting[:1] = halve(self._waiting[0])
        log.warning(
            "out of memory in a prefill of %d tokens: prefill_tokens is now %d", tokens, self.limits.prefill_tokens
        )

    def _shrink_step(self, sequences: list[Sequence], error: BaseException) -> None:
        count = len(sequences)
        if count == 1:
            _out_of_memory(sequences[0], "a step of one sequence", "", error)
            return
        self.limits.sequences = count // 2
        self._send_back(sequences[count // 2 :])
        log.warning("out of memory in a step of %d sequences: at most %d run together now", count, count // 2)


def _out_of_memory(sequence: Sequence, where: str, remedy: str, error: BaseException) -> None:
    failure = NoRoomError(
        f"{sequence.request.named}: out of memory in {where}; lower kv_cache_bytes or batch_tokens{remedy}"
    )
    failure.__cause__ = error
    sequence.fail(failure)
