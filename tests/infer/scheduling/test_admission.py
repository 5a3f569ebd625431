"""Grouping, shared prefixes and the bookkeeping of pool rows."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinyllava_fast.infer.scheduling.admission import (
    admit,
    common_prefix,
    group_sequences,
    release,
    without_ended,
)
from tinyllava_fast.infer.scheduling.images import image_key
from tinyllava_fast.infer.scheduling.pool import KVPool, Spans
from tinyllava_fast.infer.scheduling.sequence import IMAGE_ROW, Group, Sequence, Status
from tinyllava_fast.infer.types import Request, Sampling


def waiting(prompt: list[int], image: str | None = None, new: int = 4) -> Sequence:
    return Sequence(Request.ask("q", image, sampling=Sampling(max_new_tokens=new)), prompt)


def test_common_prefix_leaves_a_token_and_never_cuts_an_image():
    assert common_prefix([[1, 2, 3]]) == 0
    assert common_prefix([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert common_prefix([[1, 2], [1, 2]]) == 1
    assert common_prefix([[5], [6]]) == 0
    image = [IMAGE_ROW] * 3
    assert common_prefix([[1, *image, 7], [1, *image, 8]]) == 4
    assert common_prefix([[1, *image], [1, *image]]) == 1  # prompts that end in their image
    assert common_prefix([[1, *image, *image, 7], [1, *image, 8]]) == 1


@given(st.lists(st.lists(st.integers(-1, 2), min_size=1, max_size=8), min_size=2, max_size=5))
def test_common_prefix_is_shared_by_all(prompts):
    n = common_prefix(prompts)
    assert all(p[:n] == prompts[0][:n] and len(p) > n for p in prompts)


@settings(max_examples=50)
@given(st.data())
def test_spans_never_overlap_and_all_come_back(data):
    spans, held = Spans(40), []
    for _ in range(data.draw(st.integers(1, 25))):
        if held and data.draw(st.booleans()):
            spans.give(*held.pop(data.draw(st.integers(0, len(held) - 1))))
            continue
        rows = data.draw(st.integers(1, 12))
        start = spans.take(rows)
        if start is not None:
            assert start + rows <= 40
            assert all(start + rows <= s or s + n <= start for s, n in held)
            held.append((start, rows))
        assert spans.free_rows == 40 - sum(n for _, n in held)
    for span in held:
        spans.give(*span)
    assert spans.take(40) == 0


def test_groups_by_image_and_splits_large_ones():
    queue = [waiting([1, 2, i], image) for i in range(6) for image in ("a.png", "b.png")]
    whole = group_sequences(queue, max_rows=100, share_prefix=True)
    assert [(g.image, len(g.members), g.num_shared_tokens) for g in whole] == [("a.png", 6, 2), ("b.png", 6, 2)]
    queue = [waiting([1, 2, i], "a.png") for i in range(6)]
    split = group_sequences(queue, max_rows=10, share_prefix=True)
    assert [len(g.members) for g in split] == [2, 2, 2]
    assert all(g.num_shared_tokens == 0 for g in group_sequences(queue, max_rows=99, share_prefix=False))


def test_admission_is_all_or_nothing_and_release_returns_every_row():
    queue = [waiting([1, 2, i], image) for i in range(3) for image in ("a", "b", "c")]
    groups = group_sequences(queue, max_rows=99, share_prefix=True)  # each: 2 shared rows and 3 x 4 own ones
    spans = Spans(30)
    taken = admit(groups, spans, room=1000)
    assert [g.image for g in taken] == ["a", "b"] and [g.image for g in groups] == ["c"]
    assert spans.free_rows == 2
    for member in (m for group in taken for m in group.members):
        assert member.status is Status.RUNNING and member.num_cached_tokens == 2
        release(member, spans)
    assert spans.free_rows == 30
    assert admit(groups, spans, room=1) and not groups  # the first is admitted whatever its prefill


def test_a_group_without_those_that_have_ended():
    group = Group("a", [waiting([1, 2, 3, i], "a") for i in range(3)], 2)
    assert without_ended(group) is group
    group.members[1].abort()
    rest = without_ended(group)
    assert rest is not None and [m.prompt[3] for m in rest.members] == [0, 2] and rest.num_shared_tokens == 3
    group.members[0].abort()
    rest = without_ended(rest)
    assert rest is not None and rest.num_shared_tokens == 0 and rest.members[0].group is rest
    group.members[2].abort()
    assert without_ended(rest) is None


def test_image_key():
    one, two = Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2))
    assert image_key(one) == image_key(one) != image_key(two)
    assert image_key("x.png") == image_key("x.png") != image_key(None)


def test_pool_size():
    pool = KVPool(8, [3, 1], 4, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert pool.nbytes == 2 * (3 + 1) * 8 * 4 * 2
    assert [tuple(t.shape) for t in (*pool.k, *pool.v)] == [(8, 3, 4), (8, 1, 4)] * 2
