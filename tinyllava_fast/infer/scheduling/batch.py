"""The continuously refilled batch: admission, packed prefill, one token a step, and what happens when memory runs out.

When a pass raises torch's out-of-memory error the batch shrinks and the run goes on: after a prefill its token budget
halves, after a step the number of sequences in flight does; what was in the pass returns to the front of the queue with
the tokens it has generated, and a warning says so.

Legend: R sequences, T tokens of a pass, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.infer.fast_model.runner import PackedDecoder, Span
from tinyllava_fast.infer.finish import UNREADABLE
from tinyllava_fast.infer.scheduling.admission import (
    IMAGE_ROW,
    Group,
    Running,
    admit,
    grow,
    halve,
    image_key,
    release,
    requeue,
)
from tinyllava_fast.infer.scheduling.images import ImageEncoder
from tinyllava_fast.infer.scheduling.pool import Spans
from tinyllava_fast.log import log

Handler = Callable[[list[Running], Tensor, np.ndarray], None]


@dataclass
class Limits:
    """How much a pass may hold; shrinks when memory runs out, for as long as the engine lives."""

    prefill_tokens: int
    sequences: int | None = None  # None: as many as the pool has rows for


class Batch:
    """The sequences of one run on a pool.

    queue: groups, read lazily. handle(sequences, hidden [T, D], ends [R]) gets the hidden states of a pass and the row
    of each sequence's last token; it appends tokens and sets ``finish`` where a sequence has ended. keep_going: a
    sequence whose images cannot be read ends with UNREADABLE and ``why`` instead of ending the run with DataError.
    """

    def __init__(
        self,
        decoder: PackedDecoder,
        images: ImageEncoder,
        queue: Iterator[Group],
        handle: Handler,
        limits: Limits,
        keep_going: bool = False,
    ) -> None:
        self.decoder = decoder
        self.images = images
        self.queue = queue
        self.handle = handle
        self.limits = limits
        self.keep_going = keep_going
        self.running: list[Running] = []
        self._waiting: list[Group] = []

    def finished(self) -> Iterator[Running]:
        """Run everything; yields each sequence when it has ended, its rows given back."""
        spans = self.decoder.pool.rows
        try:
            while True:
                roomy = spans.free_rows * 2 >= spans.size
                started = self._refill() if roomy or not self.running else 0
                if not self.running and not started:
                    return
                if not started:
                    self._step()
                ended = [s for s in self.running if s.finish]
                self.running = [s for s in self.running if not s.finish]
                for sequence in ended:
                    release(sequence, spans)
                    sequence.group = None  # the two refer to each other: a long queue would wait for the collector
                yield from ended
        finally:
            self.decoder.pool.rows = Spans(spans.size)
            self.images.forget()

    def _refill(self) -> int:
        """Admit groups while the pool has room and prefill them, a bounded number of tokens at a time."""
        count = 0
        while True:
            self._read_ahead()
            limit = self.limits.sequences
            most = None if limit is None else limit - len(self.running)
            groups = admit(self._waiting, self.decoder.pool.rows, self.limits.prefill_tokens, most)
            if not groups:
                return count
            members = [m for g in groups for m in g.members]
            with _noticed_oom() as oom:
                self._prefill(groups)
            if oom:
                self._shrink_prefill(groups, oom[0])
                continue
            self.running += members
            count += len(members)

    def _read_ahead(self) -> None:
        """Have groups for one prefill at hand, and no more: the queue may be long."""
        room = self.limits.prefill_tokens - sum(g.prefill_tokens for g in self._waiting)
        while room > 0 and (group := next(self.queue, None)) is not None:
            self._waiting.append(group)
            room -= group.prefill_tokens

    def _shrink_prefill(self, groups: list[Group], error: BaseException) -> None:
        tokens = sum(g.prefill_tokens for g in groups)
        for group in groups:
            for member in group.members:
                release(member, self.decoder.pool.rows)
        if len(groups) == 1 and len(groups[0].members) == 1:
            name = groups[0].members[0].request.named
            raise UserError(
                f"{name}: out of memory in a pass of {tokens} tokens, which cannot be split; lower "
                "kv_cache_bytes or batch_tokens, or shorten the prompt"
            ) from error
        self.limits.prefill_tokens = max(1, min(self.limits.prefill_tokens, tokens) // 2)
        parts = groups if len(groups) > 1 else halve(groups[0])
        self._waiting[:0] = [Group(g.image, g.members, g.prefix) for g in parts]
        log.warning(
            "out of memory in a prefill of %d tokens: prefill_tokens is now %d", tokens, self.limits.prefill_tokens
        )

    def _step(self) -> None:
        """One token for every running sequence."""
        self._make_room()
        if not self.running:  # the last one has outgrown the pool and starts anew, in a larger range
            return
        self.running.sort(key=lambda s: s.start)
        with _noticed_oom() as oom:
            self._decode()
        if not oom:
            return
        count = len(self.running)
        if count == 1:
            raise UserError(
                f"{self.running[0].request.named}: out of memory in a step of one sequence; lower "
                "kv_cache_bytes or batch_tokens"
            ) from oom[0]
        self.limits.sequences = count // 2
        self._send_back(self.running[count // 2 :])
        log.warning("out of memory in a step of %d sequences: at most %d run together now", count, count // 2)

    @torch.inference_mode()
    def _decode(self) -> None:
        hidden = self.decoder.step(self.running)
        self.handle(self.running, hidden, np.arange(len(self.running)))
        for sequence in self.running:
            sequence.length += 1

    def _make_room(self) -> None:
        """Rows for the next token of each sequence; those that started last go back to the queue if there are none."""
        full = [s for s in self.running if s.length >= s.reserved]
        for sequence in full:
            while sequence in self.running and not grow(sequence, self.decoder.pool):
                self._send_back(self.running[-1:])

    def _send_back(self, sequences: list[Running]) -> None:
        gone = set(map(id, sequences))
        self.running = [s for s in self.running if id(s) not in gone]
        self._waiting[:0] = requeue(sequences, self.decoder.pool.rows)

    @torch.inference_mode()
    def _prefill(self, groups: list[Group]) -> None:
        """Compute the K/V of all prompts of the groups and hand on the hidden states of what is not shared."""
        failed: dict[object, DataError] | None = {} if self.keep_going else None
        features = self.images.encode((g.members[0].request for g in groups), failed)
        if failed:
            groups = _without_failed(groups, failed)
            if not groups:
                return
        shared = sorted((g for g in groups if g.prefix), key=lambda g: g.start)
        if shared:
            parts = [_shown(g.members[0], features, g.prefix)[0] for g in shared]
            self.decoder([Span(g.shared_ids, g.start, features=f) for g, f in zip(shared, parts, strict=True)])
        members = sorted(((m, g) for g in groups for m in g.members), key=lambda pair: pair[0].start)
        spans = [
            Span(m.prompt[g.prefix :] + m.tokens, m.start, 0, m.shared, _shown(m, features, g.prefix)[1])
            for m, g in members
        ]
        hidden = self.decoder(spans)
        self.handle([m for m, _ in members], hidden, np.cumsum([len(s.ids) for s in spans]) - 1)
        for (member, _), span in zip(members, spans, strict=True):
            member.length = len(span.ids)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated: on a CPU torch has no class of its own for it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextmanager
def _noticed_oom() -> Iterator[list[BaseException]]:
    """Swallows an out-of-memory error and leaves it in the list."""
    seen: list[BaseException] = []
    try:
        yield seen
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        seen.append(error.with_traceback(None))  # its frames hold the tensors of the failed pass
    if seen and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _without_failed(groups: list[Group], failed: dict[object, DataError]) -> list[Group]:
    """The groups whose images could all be read; the sequences of the others have ended."""
    whole = []
    for group in groups:
        error = next((failed[k] for i in group.members[0].request.images if (k := image_key(i)) in failed), None)
        if error is None:
            whole.append(group)
            continue
        for member in group.members:
            member.finish, member.why = UNREADABLE, f"{member.request.named}: {error.__cause__ or error}"
    return whole


def _shown(sequence: Running, features: dict[object, Tensor], cut: int) -> tuple[list[Tensor], list[Tensor]]:
    """Features of the images in the prompt's first ``cut`` tokens, where no image is cut, and of those after."""
    images = sequence.request.images
    rows = [features[image_key(images[i])] for i in sequence.shown]
    before, count = sequence.prompt[:cut].count(IMAGE_ROW), 0
    while before > 0:
        before -= len(rows[count])
        count += 1
    return rows[:count], rows[count:]
