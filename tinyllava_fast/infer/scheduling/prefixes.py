"""K/V of ended sequences, kept in their rows of the pool until others need these, for prompts that begin alike.

A second turn, another question about an image, a system text that all share: each begins with tokens whose K and V were
computed before. They are copied to the rows of the new sequence, which takes a hundredth of the time of computing them.
Copies leave every sequence with one range of rows of its own, and need no table of blocks.

What K and V depend on is ``Sequence.content``: token ids, and the pixels of images. An entry is found by the hashes of
its first 16, 32, 48, ... tokens, and compared token by token before it is used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from tinyllava_fast.infer.scheduling.pool import Spans
from tinyllava_fast.infer.scheduling.sequence import Sequence, num_common_tokens

BLOCK = 16


@dataclass(eq=False)
class Kept:
    """Tokens whose K and V are in the pool.

    content: see Sequence.content. start: their first row. owner: the sequence that they belong to while it runs.
    """

    content: list[int]
    start: int
    owner: Sequence | None = None

    @property
    def first_row(self) -> int:
        """First row of the pool; that of a running sequence may change."""
        return self.start if self.owner is None else self.owner.start

    @property
    def num_tokens(self) -> int:
        """Tokens whose K and V are there by now."""
        return len(self.content) if self.owner is None else min(len(self.content), self.owner.num_cached_tokens)


class PrefixCache:
    """Rows to copy from. Those of ended sequences are its own, and are given back in the order of their last use."""

    def __init__(self, spans: Spans) -> None:
        self.spans = spans
        spans.reclaim = self.evict
        self.num_rows = 0  # held for ended sequences
        self._ended: OrderedDict[Kept, None] = OrderedDict()  # the one used last is the last
        self._running: dict[Sequence, Kept] = {}
        self._by_block: dict[int, list[Kept]] = {}

    def longest(self, content: list[int]) -> tuple[Kept | None, int]:
        """Return what shares most tokens with the beginning of ``content``, and how many; (None, 0) if below 16."""
        levels = [self._by_block[name] for name in takewhile(self._by_block.__contains__, _blocks(content))]
        best, most = None, 0
        while levels and most < BLOCK * (len(levels) + 1):  # of a running one less may be there than it begins alike
            for kept in levels.pop():
                length = num_common_tokens(kept.content, content, kept.num_tokens)
                if length > most:
                    best, most = kept, length
        if best is None or most < BLOCK:
            return None, 0
        if best in self._ended:
            self._ended.move_to_end(best)
        return best, most

    def watch(self, sequence: Sequence, content: list[int]) -> None:
        """Let others copy from a running sequence as far as it has come."""
        self._running[sequence] = kept = Kept(content, 0, sequence)
        self._enter(kept)

    def release(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Take over the rows of a sequence that has ended; without ``keep`` they are free."""
        watched = self._running.pop(sequence, None)
        if watched is not None:
            self._leave(watched)
        held, start, tokens = sequence.num_reserved_rows, sequence.start, sequence.num_cached_tokens
        content = sequence.content()[:tokens] if keep and tokens >= BLOCK else []
        if content:
            other, length = self.longest(content)
            if length == tokens:
                content = []  # nothing that is not there already
            elif other is not None and other in self._ended and length == len(other.content):
                self._drop(other)  # this one goes on where it ended
        if held > len(content):
            self.spans.give(start + len(content), held - len(content))
        if content:
            kept = Kept(content, start)
            self._ended[kept] = None
            self.num_rows += len(content)
            self._enter(kept)
        sequence.num_cached_tokens = sequence.num_reserved_rows = 0

    def holds(self, kept: Kept) -> bool:
        """Return whether the rows still hold these tokens."""
        return kept in self._ended or (kept.owner is not None and self._running.get(kept.owner) is kept)

    def evict(self) -> bool:
        """Free the rows that were last used the longest ago; return False if there are none."""
        oldest = next(iter(self._ended), None)
        if oldest is not None:
            self._drop(oldest)
        return oldest is not None

    def _drop(self, kept: Kept) -> None:
        del self._ended[kept]
        self._leave(kept)
        self.num_rows -= len(kept.content)
        self.spans.give(kept.start, len(kept.content))

    def _enter(self, kept: Kept) -> None:
        for name in _blocks(kept.content):
            self._by_block.setdefault(name, []).append(kept)

    def _leave(self, kept: Kept) -> None:
        for name in _blocks(kept.content):
            self._by_block[name].remove(kept)
            if not self._by_block[name]:
                del self._by_block[name]


def _blocks(content: list[int]) -> Iterator[int]:
    """Yield a number for the first 16 tokens, for the first 32, and so on."""
    name = 0
    for stop in range(BLOCK, len(content) + 1, BLOCK):
        name = hash((name, *content[stop - BLOCK : stop]))
        yield name
