"""Grouping of sequences that share images and prompts, and their admission to the rows of the K/V pool."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tinyllava_fast.infer.scheduling.images import image_key
from tinyllava_fast.infer.scheduling.pool import KVPool, Spans
from tinyllava_fast.infer.scheduling.sequence import IMAGE_ROW, RESERVE, Group, Sequence, Status, num_common_tokens


def common_prefix(prompts: list[list[int]], own: int = 1) -> int:
    """Length of the longest prefix that all prompts share, leaving each at least ``own`` tokens of its own.

    It never ends inside an image. 0 for a single prompt: nothing is shared, and one pass over it is enough.
    """
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in lexicographic order: what these two share, all share
    limit = max(0, min(len(p) for p in prompts) - own)
    length = num_common_tokens(first, last, limit)
    if IMAGE_ROW in (first[length], last[length]):
        while length and first[length - 1] == IMAGE_ROW:
            length -= 1
    return length


def group_sequences(sequences: Iterable[Sequence], *, max_rows: int, share_prefix: bool) -> list[Group]:
    """Group sequences by adapter and images. A group above max_rows is split; each part computes its own prefix."""
    by_image: dict[object, list[Sequence]] = {}
    for sequence in sequences:
        by_image.setdefault((sequence.adapter, image_key(sequence.request.image)), []).append(sequence)
    return [group for members in by_image.values() for group in _split(members, max_rows, share_prefix)]


def admit(groups: list[Group], spans: Spans, room: int, most: int | None = None) -> list[Group]:
    """Take groups from the front of the list while their rows fit the pool and their prefill fits ``room`` tokens.

    most: sequences that may be added. The first group is admitted even if it alone exceeds ``room``.
    """
    taken: list[Group] = []
    while groups and (not taken or groups[0].num_prefill_tokens <= room):
        if most is not None and len(groups[0].members) > most:
            if most < 1 or taken:
                return taken
            groups[:1] = _halves(groups[0], most)
        if not _place(groups[0], spans):
            return taken
        if most is not None:
            most -= len(groups[0].members)
        room -= groups[0].num_prefill_tokens
        taken.append(groups.pop(0))
    return taken


def grow(sequence: Sequence, pool: KVPool) -> bool:
    """Reserve rows for the next tokens of a sequence that has used all of its own; False if the pool is too full."""
    spans, held = pool.rows, sequence.num_reserved_rows
    more = min(sequence.most_rows - held, RESERVE)
    if spans.extend(sequence.start + held, more):
        sequence.num_reserved_rows += more
        return True
    target = spans.take(held + more)
    if target is None:
        return False
    pool.move(sequence.start, target, sequence.num_own_cached)
    spans.give(sequence.start, held)
    sequence.start, sequence.num_reserved_rows = target, held + more
    return True


def requeue(sequences: list[Sequence], spans: Spans) -> list[Group]:
    """Take sequences off the pool; the groups that start them anew, tokens generated so far included."""
    by_group: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        by_group.setdefault(id(sequence.group), []).append(sequence)
        release(sequence, spans)
        sequence.status = Status.WAITING
    return [_group(members, share_prefix=bool(members[0].shared_rows[1])) for members in by_group.values()]


def halve(group: Group) -> list[Group]:
    """A group of several sequences as two."""
    return _halves(group, len(group.members) // 2)


def without_ended(group: Group) -> Group | None:
    """Return the group of those members that have not ended; None if all have."""
    rest = [m for m in group.members if not m.ended]
    if len(rest) == len(group.members):
        return group
    return _group(rest, group.num_shared_tokens > 0) if rest else None


def release(sequence: Sequence, spans: Spans) -> None:
    """Give a sequence's rows back, and those of its group's prefix with the last member."""
    group = sequence.group
    assert group is not None  # noqa: S101 only grouped sequences are ever admitted
    if sequence.num_reserved_rows:
        spans.give(sequence.start, sequence.num_reserved_rows)
    sequence.num_cached_tokens = sequence.num_reserved_rows = 0
    group.num_alive -= 1
    if group.num_alive == 0 and group.num_shared_tokens:
        spans.give(group.shared_start, group.num_shared_tokens)


def _split(members: list[Sequence], max_rows: int, share_prefix: bool) -> Iterator[Group]:
    shared = _num_shared(members) if share_prefix else 0
    part: list[Sequence] = []
    rows = shared
    for member in members:
        own = member.first_rows - shared
        if part and rows + own > max_rows:
            yield _group(part, share_prefix)
            part, rows = [], shared
        part.append(member)
        rows += own
    if part:
        yield _group(part, share_prefix)


def _group(members: list[Sequence], share_prefix: bool) -> Group:
    return Group(members[0].request.image, members, _num_shared(members) if share_prefix else 0)


def _num_shared(members: list[Sequence]) -> int:
    own = max(1, *(len(m.scored) for m in members))
    return common_prefix([m.prompt for m in members], own)


def _halves(group: Group, first: int) -> list[Group]:
    share = group.num_shared_tokens > 0
    return [_group(group.members[:first], share), _group(group.members[first:], share)]


def _place(group: Group, spans: Spans) -> bool:
    """Reserve the rows of a group; all or nothing."""
    taken: list[tuple[int, int]] = []

    def take(rows: int) -> int | None:
        start = spans.take(rows)
        if start is not None:
            taken.append((start, rows))
        return start

    group_start = take(group.num_shared_tokens) if group.num_shared_tokens else 0
    starts = [take(m.first_rows) if group_start is not None else None for m in group.members]
    if group_start is None or any(s is None for s in starts):
        for first, rows in taken:
            spans.give(first, rows)
        return False
    group.shared_start = group_start
    for member, start in zip(group.members, starts, strict=True):
        assert start is not None  # noqa: S101 checked for all members above
        member.start, member.num_reserved_rows = start, member.first_rows
        member.num_cached_tokens, member.status = group.num_shared_tokens, Status.RUNNING
    return True
