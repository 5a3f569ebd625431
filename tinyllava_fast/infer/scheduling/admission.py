"""Which requests run when: grouping by image, shared prefixes, and admission to the K/V pool.

Legend: a prompt is a list of token ids in which every image marker has been expanded to its image's rows of IMAGE_ROW.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from PIL import Image

from tinyllava_fast.infer.scheduling.pool import KVPool, Spans
from tinyllava_fast.infer.text import TextStream
from tinyllava_fast.infer.types import Images, Request

IMAGE_ROW = -1
RESERVE = 16  # rows for new tokens that a sequence holds in advance


@dataclass(eq=False)
class Running:
    """One sequence: its request, where its rows lie in the pool, and what it has produced.

    scored: instead of generating, the probabilities of these tokens are wanted; the last position of the prompt
    predicts the last of them.
    """

    request: Request
    prompt: list[int]
    shown: Sequence[int] = ()  # which of the request's images each marker of the prompt stands for
    scored: Sequence[int] = ()
    group: Group | None = None
    start: int = 0  # first pool row of the sequence's own tokens (those after the shared prefix)
    length: int = 0  # own rows written so far
    reserved: int = 0  # own rows held
    tokens: list[int] = field(default_factory=list)
    finish: str = ""  # why it has ended; "" while it has not
    why: str = ""  # what is wrong with a request that cannot be put to the model
    cut: bool = False  # its request wanted more new tokens than the model's context has room for
    ends: frozenset[int] = frozenset()  # tokens that end it
    text: TextStream | None = None  # where text is needed before the end
    result: Any = None  # of a scored sequence

    @property
    def shared(self) -> tuple[int, int]:
        """(start, length) of the shared prefix in the pool; (0, 0) if there is none."""
        return (self.group.start, self.group.prefix) if self.group is not None and self.group.prefix else (0, 0)

    @property
    def most_rows(self) -> int:
        """Own rows of the whole sequence: all tokens after the prefix but the last one, which is never fed back."""
        new = 1 if self.scored else self.request.sampling.max_new_tokens
        return len(self.prompt) - self.shared[1] + new - 1

    @property
    def first_rows(self) -> int:
        """Own rows that it is admitted with: what its prefill writes, and room for a short answer."""
        return min(self.most_rows, len(self.prompt) - self.shared[1] + len(self.tokens) + RESERVE)


@dataclass(eq=False)
class Group:
    """Sequences that ask about the same images and share the first ``prefix`` tokens of their prompts."""

    image: Images | None
    members: list[Running]
    prefix: int = 0
    start: int = 0
    alive: int = 0

    def __post_init__(self) -> None:
        self.alive = len(self.members)
        for member in self.members:
            member.group = self

    @property
    def shared_ids(self) -> list[int]:
        """The prefix itself."""
        return self.members[0].prompt[: self.prefix]

    @property
    def prefill_tokens(self) -> int:
        """Tokens that its prefill computes."""
        return self.prefix + sum(len(m.prompt) + len(m.tokens) - self.prefix for m in self.members)


def image_key(image: Images | None) -> object:
    """What makes two images the same one: a path's text, or the identity of an image object; of a list, its items'."""
    if isinstance(image, (list, tuple)):
        return tuple(image_key(one) for one in image)
    return id(image) if isinstance(image, Image.Image) else str(image)


def common_prefix(prompts: list[list[int]], own: int = 1) -> int:
    """Length of the longest prefix that all prompts share, leaving each at least ``own`` tokens of its own.

    It never ends inside an image. 0 for a single prompt: nothing is shared, and one pass over it is enough.
    """
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in lexicographic order: what these two share, all share
    limit = max(0, min(len(p) for p in prompts) - own)
    length = next((i for i in range(limit) if first[i] != last[i]), limit)
    if IMAGE_ROW in (first[length], last[length]):
        while length and first[length - 1] == IMAGE_ROW:
            length -= 1
    return length


def group_requests(sequences: Iterable[Running], *, window: int, max_rows: int, share_prefix: bool) -> Iterator[Group]:
    """Groups by image within a look-ahead window, so that a long queue is never held at once.

    A group larger than max_rows is split; each part computes its own prefix.
    """
    source = iter(sequences)
    while chunk := list(islice(source, window)):
        by_image: dict[object, list[Running]] = {}
        for sequence in chunk:
            by_image.setdefault(image_key(sequence.request.image), []).append(sequence)
        for members in by_image.values():
            yield from _split(members, max_rows, share_prefix)


def admit(groups: list[Group], spans: Spans, room: int, most: int | None = None) -> list[Group]:
    """Take groups from the front of the list while their rows fit the pool and their prefill fits ``room`` tokens.

    most: sequences that may be added. The first group is admitted even if it alone exceeds ``room``.
    """
    taken: list[Group] = []
    while groups and (not taken or groups[0].prefill_tokens <= room):
        if most is not None and len(groups[0].members) > most:
            if most < 1 or taken:
                return taken
            groups[:1] = _halves(groups[0], most)
        if not _place(groups[0], spans):
            return taken
        if most is not None:
            most -= len(groups[0].members)
        room -= groups[0].prefill_tokens
        taken.append(groups.pop(0))
    return taken


def grow(sequence: Running, pool: KVPool) -> bool:
    """Reserve rows for the next tokens of a sequence that has used all of its own; False if the pool is too full."""
    spans, held = pool.rows, sequence.reserved
    more = min(sequence.most_rows - held, RESERVE)
    if spans.extend(sequence.start + held, more):
        sequence.reserved += more
        return True
    target = spans.take(held + more)
    if target is None:
        return False
    pool.move(sequence.start, target, sequence.length)
    spans.give(sequence.start, held)
    sequence.start, sequence.reserved = target, held + more
    return True


def requeue(sequences: list[Running], spans: Spans) -> list[Group]:
    """Take sequences off the pool; the groups that start them anew, tokens generated so far included."""
    by_group: dict[int, list[Running]] = {}
    for sequence in sequences:
        by_group.setdefault(id(sequence.group), []).append(sequence)
        release(sequence, spans)
    return [_group(members, share_prefix=bool(members[0].shared[1])) for members in by_group.values()]


def halve(group: Group) -> list[Group]:
    """A group of several sequences as two."""
    return _halves(group, len(group.members) // 2)


def release(sequence: Running, spans: Spans) -> None:
    """Give a sequence's rows back, and those of its group's prefix with the last member."""
    group = sequence.group
    assert group is not None  # noqa: S101 only grouped sequences are ever admitted
    if sequence.reserved:
        spans.give(sequence.start, sequence.reserved)
    sequence.length = sequence.reserved = 0
    group.alive -= 1
    if group.alive == 0 and group.prefix:
        spans.give(group.start, group.prefix)


def _split(members: list[Running], max_rows: int, share_prefix: bool) -> Iterator[Group]:
    prefix = _prefix_of(members) if share_prefix else 0
    part: list[Running] = []
    rows = prefix
    for member in members:
        own = member.first_rows - prefix
        if part and rows + own > max_rows:
            yield _group(part, share_prefix)
            part, rows = [], prefix
        part.append(member)
        rows += own
    if part:
        yield _group(part, share_prefix)


def _group(members: list[Running], share_prefix: bool) -> Group:
    return Group(members[0].request.image, members, _prefix_of(members) if share_prefix else 0)


def _prefix_of(members: list[Running]) -> int:
    own = max(1, *(len(m.scored) for m in members))
    return common_prefix([m.prompt for m in members], own)


def _halves(group: Group, first: int) -> list[Group]:
    share = group.prefix > 0
    return [_group(group.members[:first], share), _group(group.members[first:], share)]


def _place(group: Group, spans: Spans) -> bool:
    """Reserve the rows of a group; all or nothing."""
    taken: list[tuple[int, int]] = []

    def take(rows: int) -> int | None:
        start = spans.take(rows)
        if start is not None:
            taken.append((start, rows))
        return start

    group_start = take(group.prefix) if group.prefix else 0
    starts = [take(m.first_rows) if group_start is not None else None for m in group.members]
    if group_start is None or any(s is None for s in starts):
        for first, rows in taken:
            spans.give(first, rows)
        return False
    group.start = group_start
    for member, start in zip(group.members, starts, strict=True):
        assert start is not None  # noqa: S101 checked for all members above
        member.start, member.reserved = start, member.first_rows
    return True
