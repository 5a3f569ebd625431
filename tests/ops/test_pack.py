from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinyllava_fast.ops import pack_plan
from tinyllava_fast.ops._op import force_backend

Need = list[tuple[int, int, int]]


def columns(need: Need) -> tuple[Tensor, Tensor, Tensor]:
    table = torch.tensor(need, dtype=torch.int64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]  # strided views


def plan(need: Need, limits: tuple[int, int, int], lookahead: int, backend: str = "cpp") -> list[int]:
    with force_backend(backend):
        return pack_plan(*columns(need), *limits, lookahead).tolist()


@settings(max_examples=60, deadline=None)
@given(
    need=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3), st.integers(1, 4)), max_size=60),
    lookahead=st.integers(1, 80),
    slack=st.tuples(st.integers(0, 60), st.integers(0, 4), st.integers(0, 6)),
)
def test_properties(need: Need, lookahead: int, slack: tuple[int, int, int]) -> None:
    limits = (50 + slack[0], 3 + slack[1], 4 + slack[2])
    packs = plan(need, limits, lookahead)
    assert packs == plan(need, limits, lookahead, "reference"), "C++ and Python decide alike"
    assert packs == plan(need, limits, lookahead), "deterministic"
    assert len(packs) == len(need), "every sample in exactly one pack"
    assert sorted(set(packs)) == list(range(len(set(packs)))), "dense, none empty"
    for p in set(packs):
        for kind, limit in enumerate(limits):
            assert sum(n[kind] for n, q in zip(need, packs, strict=True) if q == p) <= limit
    opened = [packs.index(p) for p in range(len(set(packs)))]
    assert all(min(i for i, q in enumerate(packs) if q >= p) == opened[p] for p in range(len(opened))), (
        "each pack holds the oldest sample that earlier ones left"
    )


def test_best_fit_by_hand() -> None:
    need = [(60, 0, 1), (30, 0, 1), (40, 0, 1), (10, 0, 1), (40, 0, 1)]
    assert plan(need, (100, 9, 9), 5) == [0, 1, 0, 1, 1]  # 60 takes the first 40; 30 takes the other, then 10
    assert plan(need, (100, 9, 9), 1) == [0, 0, 1, 1, 1]  # no look-ahead: next fit
    assert plan([(10, 2, 1), (10, 2, 1), (10, 1, 1)], (100, 3, 9), 9) == [0, 1, 0]  # images are the limit
    assert plan([(10, 0, 3), (10, 0, 2), (10, 0, 1)], (100, 3, 4), 9) == [0, 1, 0]  # segments are


def test_fill_of_log_normal_lengths() -> None:
    g = torch.Generator().manual_seed(0)
    lengths = torch.exp(torch.randn(20_000, generator=g) * 0.6 + 5.8).long().clamp(1, 4096)
    assert 350 < float(lengths.float().mean()) < 450
    ones = torch.ones_like(lengths)
    packs = pack_plan(lengths, ones, ones, 4096, 64, 64, 512)
    fill = torch.zeros(int(packs.max()) + 1, dtype=torch.int64).index_add_(0, packs, lengths)
    assert int(fill.max()) <= 4096
    assert float(fill.float().mean()) / 4096 >= 0.97


@pytest.mark.parametrize(
    ("need", "text"),
    [
        ([(5, 0, 1), (101, 0, 1)], "sample 1 has 101 tokens, more than budget = 100"),
        ([(5, 9, 1)], "sample 0 has 9 images, more than max_images = 8"),
        ([(5, 0, 7)], "sample 0 has 7 segments, more than max_segments = 6"),
        ([(0, 0, 1)], "sample 0 has 0 tokens, fewer than 1"),
    ],
)
def test_a_sample_that_fits_nowhere_is_named(need: Need, text: str) -> None:
    with pytest.raises(ValueError, match=f"^pack_plan: {text}"):
        plan(need, (100, 8, 6), 4)


def test_other_errors() -> None:
    lengths, images, segments = columns([(5, 0, 1)])
    with pytest.raises(ValueError, match="pack_plan: images has 2 entries for 1 lengths"):
        pack_plan(lengths, torch.zeros(2, dtype=torch.int64), segments, 10, 1, 1, 1)
    with pytest.raises(ValueError, match="pack_plan: lookahead must be >= 1, got 0"):
        pack_plan(lengths, images, segments, 10, 1, 1, 0)
    with pytest.raises(ValueError, match="pack_plan: lengths must be int64, got float32"):
        pack_plan(lengths.float(), images, segments, 10, 1, 1, 1)
