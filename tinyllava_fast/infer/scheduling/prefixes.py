"""K/V of earlier sequences, left in the pool until others need its rows, for prompts that begin alike.

A second turn, another question about an image, a system text that all share: each begins with tokens whose K and V were
computed before. Rows that several sequences begin with are a stem: nobody's own, read by all of them where they lie, as
those of a group are. So a sequence has two ranges of rows, its stem's and its own, and needs no table of blocks. What a
stem does not cover is copied to its own rows, which takes a hundredth of the time of computing it. A stem has no stem:
where many rows would have to be copied behind one, they become a stem together with its rows.

What K and V depend on is ``Sequence.content``: token ids, and the pixels of images. An entry is found by the hashes of
its first 16, 32, 48, ... tokens, and compared token by token before it is used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from tinyllava_fast.infer.scheduling.pool import KVPool
from tinyllava_fast.infer.scheduling.sequence import Sequence, num_common_tokens

BLOCK = 16
LEAST_SHARED = 64  # tokens; fewer are copied: a short stem would keep all longer ones from being shared
ROWS_A_TOKEN = 16  # to copy so many rows is as bad as to compute a token: they take time, and room


@dataclass(eq=False)
class Kept:
    """Tokens whose K and V are in the pool.

    content: see Sequence.content. start: first row of those behind the stem. owner: the sequence that they belong to
    while it runs. stem: whose rows hold the first ``num_shared`` of them. readers: running sequences that have these
    rows as their stem; branches: ended ones.
    """

    content: list[int]
    start: int = 0
    owner: Sequence | None = None
    stem: Kept | None = None
    num_shared: int = 0
    readers: int = 0
    branches: int = 0

    @property
    def first_row(self) -> int:
        """First row of the pool behind the stem; that of a running sequence may change."""
        return self.start if self.owner is None else self.owner.start

    @property
    def num_tokens(self) -> int:
        """Tokens whose K and V are there by now."""
        return len(self.content) if self.owner is None else min(len(self.content), self.owner.num_cached_tokens)

    @property
    def num_own(self) -> int:
        """Rows behind the stem, of an ended sequence."""
        return len(self.content) - self.num_shared

    @property
    def needed(self) -> bool:
        """Return whether others begin with its rows."""
        return self.readers > 0 or self.branches > 0


class PrefixCache:
    """Rows to begin with. Those of ended sequences are its own, and are given back in the order of their last use.

    share: whether sequences may have stems; otherwise all rows are copied. reuse: False: no sequence begins with the
    rows of another.
    """

    def __init__(self, pool: KVPool, *, share: bool = True, reuse: bool = True) -> None:
        self.pool = pool
        self.share = share
        self.reuse = reuse
        pool.rows.reclaim = self.evict
        self.num_rows = 0  # held that no running sequence reads
        self._ended: OrderedDict[Kept, None] = OrderedDict()  # the one used last is the last
        self._running: dict[Sequence, Kept] = {}
        self._by_block: dict[int, dict[Kept, None]] = {}

    def longest(self, content: list[int]) -> tuple[Kept | None, int]:
        """Return what is best to begin ``content`` with, and how many tokens both share; (None, 0) if below 16.

        That is what shares most tokens, unless less has to be copied from another that shares hardly fewer.
        """
        levels = [self._by_block[name] for name in takewhile(self._by_block.__contains__, _blocks(content))]
        best, most, found = None, 0.0, 0
        seen: set[Kept] = set()
        while levels and most < BLOCK * (len(levels) + 1) - 1:  # what more could be found at this level
            for kept in levels.pop():
                if kept in seen:
                    continue
                seen.add(kept)
                length = num_common_tokens(kept.content, content, kept.num_tokens)
                if length >= BLOCK and (worth := length - self._num_copied(kept, length) / ROWS_A_TOKEN) > most:
                    best, most, found = kept, worth, length
        if best is not None:
            self._touch(best)
        return best, found

    def place(self, sequence: Sequence, content: list[int], kept: Kept | None, length: int) -> bool:
        """Give a sequence rows, in which the first ``length`` tokens are those of ``kept``; False if there is no room.

        Others may begin with its rows from now on, as far as it has come.
        """
        if sequence.num_tokens - length > self.pool.rows.free_rows + self.num_rows:
            return False
        stem, shared = (None, 0) if kept is None else self._stem_for(kept, length)
        start = self._take(sequence, stem, shared)
        if start is None and stem is not None:  # what the stem holds beyond the shared tokens may be what is missing
            stem, shared = None, 0
            start = self._take(sequence, stem, shared)
        if start is None:
            return False
        if kept is None or not self._holds(kept):  # its rows may have been needed
            length = shared
        self._copy(kept, shared, length, start)
        sequence.start, sequence.num_cached_tokens = start, length
        self._running[sequence] = watched = Kept(content, 0, sequence, stem, shared)
        self._enter(watched)
        return True

    def release(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Take over the rows of a sequence that has ended; without ``keep`` they are free."""
        watched = self._running.pop(sequence)
        self._leave(watched)
        stem, shared = watched.stem, watched.num_shared
        start, tokens = sequence.start, sequence.num_cached_tokens
        content = sequence.content()[:tokens] if keep and self.reuse and tokens >= BLOCK else []
        if content:
            other, length = self.longest(content)
            if length == tokens:
                content = []  # nothing that is not there already
            elif other is not None and other in self._ended and length == len(other.content) and not other.needed:
                self._drop(other)  # this one goes on where it ended
        own = max(0, len(content) - shared)
        if sequence.num_reserved_rows > own:
            self.pool.rows.give(start + own, sequence.num_reserved_rows - own)
        if own:
            self._keep(Kept(content, start, None, stem, shared))
        if stem is not None:
            self._read(stem, -1)
            self._touch(stem)
        sequence.num_cached_tokens = sequence.num_reserved_rows = 0
        sequence.stem_rows = (0, 0)

    def evict(self) -> bool:
        """Free the rows that were last used the longest ago and that nobody needs; return False if there are none."""
        oldest = next((kept for kept in self._ended if not kept.needed), None)
        if oldest is not None:
            self._drop(oldest)
        return oldest is not None

    def _num_copied(self, kept: Kept, length: int) -> int:
        """Return how many rows are copied for a sequence that begins with the first tokens of ``kept``."""
        if not self.share or length < LEAST_SHARED:
            return length
        rest = 0 if kept.stem is None else max(0, length - kept.num_shared)
        return rest if rest < LEAST_SHARED else length

    def _stem_for(self, kept: Kept, length: int) -> tuple[Kept | None, int]:
        """Return the stem of a sequence that begins with the first ``length`` tokens of ``kept``, and how far it goes.

        Rows of ``kept`` become a stem where they lie, if they have none.
        """
        if not self.share or length < LEAST_SHARED:
            return None, 0
        if kept.stem is None:
            if kept.owner is not None or (length < len(kept.content) and not kept.needed):
                return self._split(kept, length), length
            return kept, length
        shared = min(length, kept.num_shared)
        made = self._joined(kept, length) if length - shared >= LEAST_SHARED else None
        return (kept.stem, shared) if made is None else (made, length)

    def _split(self, kept: Kept, length: int) -> Kept:
        """Make a stem of the first rows of ``kept``, which has none."""
        stem, owner = Kept(kept.content[:length], kept.first_row), kept.owner
        if owner is None:
            self.num_rows -= length
            kept.start += length
            stem.branches = 1
        else:
            owner.start += length
            owner.num_reserved_rows -= length
            owner.stem_rows = (stem.start, length)
        kept.stem, kept.num_shared = stem, length
        self._keep(stem)
        if owner is not None:
            self._read(stem, 1)
        return stem

    def _joined(self, kept: Kept, length: int) -> Kept | None:
        """Make a stem of copies of the stem of ``kept`` and of its next rows; None if there is no room."""
        kept.branches += 1  # it stays
        start = self.pool.rows.take(length) if length <= self.pool.rows.free_rows + self.num_rows else None
        kept.branches -= 1
        if start is None:
            return None
        self._copy(kept, 0, length, start)
        stem = Kept(kept.content[:length], start)
        self._keep(stem)
        return stem

    def _take(self, sequence: Sequence, stem: Kept | None, shared: int) -> int | None:
        """Return the first of the rows that a sequence begins with behind its stem, None if there are too few."""
        if stem is not None:
            self._read(stem, 1)
        sequence.stem_rows = (0 if stem is None else stem.start, shared)
        rows, spans = sequence.first_rows, self.pool.rows
        start = spans.take(rows) if rows <= spans.free_rows + self.num_rows else None
        if start is not None:
            sequence.num_reserved_rows = rows
            return start
        sequence.stem_rows = (0, 0)
        if stem is not None:
            self._read(stem, -1)
        return None

    def _copy(self, kept: Kept | None, first: int, stop: int, target: int) -> None:
        """Copy the rows of the tokens [first, stop)."""
        if kept is None:
            return
        middle = min(stop, max(first, kept.num_shared))
        if kept.stem is not None and first < middle:
            self.pool.move(kept.stem.start + first, target, middle - first)
        if middle < stop:
            self.pool.move(kept.first_row + middle - kept.num_shared, target + middle - first, stop - middle)

    def _holds(self, kept: Kept) -> bool:
        """Return whether the rows still hold these tokens."""
        return kept in self._ended or (kept.owner is not None and self._running.get(kept.owner) is kept)

    def _touch(self, kept: Kept) -> None:
        """Note that it is used, and with it its stem."""
        for one in (kept, kept.stem):
            if one is not None and one in self._ended:
                self._ended.move_to_end(one)

    def _read(self, stem: Kept, more: int) -> None:
        """Note that one more running sequence reads the rows of a stem, or one less."""
        before, stem.readers = stem.readers, stem.readers + more
        if not before or not stem.readers:
            self.num_rows -= more * stem.num_own

    def _keep(self, kept: Kept) -> None:
        if kept.stem is not None:
            kept.stem.branches += 1
        self._ended[kept] = None
        self.num_rows += kept.num_own
        self._enter(kept)

    def _drop(self, kept: Kept) -> None:
        if kept.stem is not None:
            kept.stem.branches -= 1
        del self._ended[kept]
        self._leave(kept)
        self.num_rows -= kept.num_own
        self.pool.rows.give(kept.start, kept.num_own)

    def _enter(self, kept: Kept) -> None:
        for name in _blocks(kept.content) if self.reuse else ():
            self._by_block.setdefault(name, {})[kept] = None

    def _leave(self, kept: Kept) -> None:
        for name in _blocks(kept.content) if self.reuse else ():
            del self._by_block[name][kept]
            if not self._by_block[name]:
                del self._by_block[name]


def _blocks(content: list[int]) -> Iterator[int]:
    """Yield a number for the first 16 tokens, for the first 32, and so on."""
    name = 0
    for stop in range(BLOCK, len(content) + 1, BLOCK):
        name = hash((name, *content[stop - BLOCK : stop]))
        yield name
