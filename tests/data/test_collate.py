from __future__ import annotations

import numpy as np
import pytest
import torch

from tinyllava_fast.data.collate import collate, targets, truncate, width
from tinyllava_fast.data.templates.base import Segment
from tinyllava_fast.data.types import IMAGE_INDEX as IMG

K = 3
SAMPLES = [
    [Segment([1, 5, IMG, 6, 7, 8], [(4, 6)])],
    [Segment([1, IMG]), Segment([9, 10, 2], [(1, 3)], True), Segment([11, 2], [(1, 2)], True)],
    [Segment([1, 12, 13, 2], [(0, 2), (3, 4)])],
]


def pack(samples=SAMPLES, tokens=28, **more):
    count = sum(s.ids.count(IMG) for sample in samples for s in sample)
    pixels = torch.arange(count * 12, dtype=torch.float32).reshape(count, 3, 2, 2)
    return collate(samples, pixels, tokens=tokens, max_segments=8, tokens_per_image=K, **more)


def test_every_field_by_hand():
    batch = pack(sample_ids=["a", "b", "c"])
    x = -100
    assert (
        batch.input_ids.tolist()
        == [1, 5, 0, 0, 0, 6, 7, 8] + [1, 0, 0, 0] + [9, 10, 2] + [11, 2] + [1, 12, 13, 2] + [0] * 7
    )
    assert batch.labels.tolist() == [x, x, x, x, x, 7, 8, x] + [x] * 4 + [10, 2, x] + [2, x] + [12, x, 2, x] + [x] * 7
    assert batch.position_ids.tolist() == [*range(8), *range(4), 4, 5, 6, 4, 5, *range(4)] + [0] * 7
    assert batch.cu_seqlens.tolist() == [0, 8, 12, 15, 17, 21, 21, 21, 21]
    assert batch.prefix.tolist() == [[0, 0], [0, 0], [8, 4], [8, 4], [0, 0], [0, 0], [0, 0], [0, 0]]
    assert batch.image_slots.tolist() == [2, 3, 4, 9, 10, 11]
    assert batch.supervised.tolist() == [5, 6, 12, 13, 15, 17, 19] + [28] * 21
    assert (batch.num_supervised, batch.num_tokens, batch.num_samples) == (7, 21, 3)
    assert batch.sample_ids == ["a", "b", "c"]
    dtypes = {name: value.dtype for name, value in batch.tensors().items()}
    assert dtypes.pop("cu_seqlens") == dtypes.pop("prefix") == torch.int32
    assert dtypes.pop("pixel_values") == torch.float32
    assert set(dtypes.values()) == {torch.int64}


def token_by_token(samples, spare):
    """The fields of a pack of samples of one segment, laid out one token at a time."""
    ids, labels, positions, slots, bounds = [], [], [], [], [0]
    for [segment] in samples:
        row, target = [], []
        for at, token in enumerate(segment.ids):
            if token == IMG:
                slots += range(bounds[-1] + len(row), bounds[-1] + len(row) + K)
                row += [0] * K
                target += [-100] * K
            else:
                row.append(token)
                target.append(token if any(start <= at < stop for start, stop in segment.spans) else -100)
        ids += row
        labels += [*target[1:], -100]
        positions += range(len(row))
        bounds.append(len(ids))
    supervised = [i for i, label in enumerate(labels) if label != -100]
    total = len(ids) + spare
    return {
        "input_ids": ids + [0] * spare,
        "labels": labels + [-100] * spare,
        "position_ids": positions + [0] * spare,
        "cu_seqlens": bounds + [bounds[-1]] * spare,
        "image_slots": slots,
        "supervised": supervised + [total] * (total - len(supervised)),
        "prefix": [[0, 0]] * (len(samples) + spare),
    }


@pytest.mark.parametrize("spare", [0, 3])
def test_equals_a_pack_made_token_by_token(spare):
    rng = np.random.default_rng(spare)
    samples = []
    for _ in range(12):
        ids = rng.integers(3, 99, rng.integers(4, 12)).tolist()
        ids[1:1] = [IMG] * int(rng.integers(3))
        learnt = np.flatnonzero(rng.random(len(ids)) < 0.4).tolist()
        samples.append([Segment(ids, [(i, i + 1) for i in learnt if ids[i] != IMG])])
    wanted = token_by_token(samples, spare)
    sizes = {"tokens": len(wanted["input_ids"]), "max_segments": len(samples) + spare, "tokens_per_image": K}
    batch = collate(samples, torch.zeros(len(wanted["image_slots"]) // K, 3, 2, 2), **sizes)
    assert {name: getattr(batch, name).tolist() for name in wanted} == wanted


def test_blank_images_fill_no_position():
    batch = pack(image_multiple=4)
    assert batch.pixel_values.shape == (4, 3, 2, 2)
    assert torch.equal(batch.pixel_values[2:], torch.zeros(2, 3, 2, 2))
    assert batch.image_slots.tolist() == [2, 3, 4, 9, 10, 11] + [28] * 6
    assert pack(image_multiple=2).pixel_values.shape[0] == 2


def test_empty_packs_and_packs_of_text():
    empty = collate([], torch.zeros(0, 3, 2, 2), tokens=5, max_segments=2, tokens_per_image=K, image_multiple=4)
    assert empty.num_supervised == empty.num_tokens == 0
    assert empty.cu_seqlens.tolist() == [0, 0, 0] and empty.supervised.tolist() == [5] * 5
    text = pack([SAMPLES[2]], tokens=4)
    assert text.image_slots.shape == (0,) and text.pixel_values.shape[0] == 0
    assert text.labels.tolist() == [12, -100, 2, -100]


def test_packed_equals_unpacked():
    """Each sample's rows in a pack are its rows in a pack of its own, moved."""
    rng = np.random.default_rng(1)
    samples = []
    for _ in range(12):
        ids = rng.integers(3, 99, rng.integers(2, 9)).tolist()
        ids[rng.integers(len(ids))] = IMG
        samples.append([Segment(ids, [(1, len(ids))])])
        if rng.random() < 0.5:
            samples[-1] += [Segment(rng.integers(3, 99, 4).tolist(), [(2, 4)], True) for _ in range(2)]
    whole = collate(samples, torch.zeros(12, 3, 1, 1), tokens=400, max_segments=40, tokens_per_image=K)
    at = segment = 0
    for number, sample in enumerate(samples):
        own = collate([sample], torch.zeros(1, 3, 1, 1), tokens=400, max_segments=40, tokens_per_image=K)
        n, s = own.num_tokens, len(sample)
        for name in ("input_ids", "labels", "position_ids"):
            assert getattr(whole, name)[at : at + n].tolist() == getattr(own, name)[:n].tolist()
        assert (whole.cu_seqlens[segment : segment + s + 1] - at).tolist() == own.cu_seqlens[: s + 1].tolist()
        shift = (own.prefix[:s, 1:] > 0) * torch.tensor([[at, 0]], dtype=torch.int32)
        assert torch.equal(whole.prefix[segment : segment + s], own.prefix[:s] + shift)
        assert (whole.image_slots[number * K : (number + 1) * K] - at).tolist() == own.image_slots.tolist()
        assert own.num_supervised == targets(sample) == int((own.labels != -100).sum())
        at, segment = at + n, segment + s
    assert whole.num_tokens == at == sum(width(sample, K) for sample in samples)


def test_misfits():
    with pytest.raises(ValueError, match=r"21 tokens in 5 segments exceed the pack of 20 in 8; raise batch.tokens"):
        pack(tokens=20)
    with pytest.raises(ValueError, match="1 image markers but 0 images"):
        collate([SAMPLES[0]], torch.zeros(0, 3, 2, 2), tokens=9, max_segments=1, tokens_per_image=K)


@pytest.mark.parametrize("budget", range(1, 12))
def test_truncation_keeps_whole_images_and_the_budget(budget):
    for sample in SAMPLES:
        cut = truncate(sample, budget, K)
        assert width(cut, K) <= budget
        for before, after in zip(sample, cut, strict=False):
            assert before.ids[: len(after.ids)] == after.ids and before.on_prefix == after.on_prefix
            assert after.labels() == before.labels()[: len(after.ids)]
    assert truncate(SAMPLES[0], 4, K) == [Segment([1, 5])]
    assert truncate(SAMPLES[1], 6, K) == [Segment([1, IMG]), Segment([9, 10], [(1, 2)], True)]
