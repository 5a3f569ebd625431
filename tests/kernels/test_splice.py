"""The splice kernels, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.agreement import TINY, cases, disagreements, name, runnable
from tinyllava_fast.kernels import splice as kernels
from tinyllava_fast.ops._op import OPS, Op, Sample, force_backend
from tinyllava_fast.ops.splice import splice

CASES = [case for case in cases() if case[0].module == "splice" and case[0].triton is not None]


@pytest.mark.parametrize("dtype", list(TINY), ids=name)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_agrees_with_float64(case: tuple[Op, Sample], dtype: torch.dtype) -> None:
    assert runnable(*case, dtype, "triton") is None
    assert not list(disagreements(*case, dtype, "triton"))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 70),
    vocab=st.integers(1, 9),
    dim=st.sampled_from([1, 16, 33, 260]),
    share=st.floats(0, 1),
    dropped=st.integers(0, 3),
    dtype=st.sampled_from(list(TINY)),
)
def test_ragged(tokens: int, vocab: int, dim: int, share: float, dropped: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(tokens)
    slots = torch.randperm(tokens, generator=g)[: round(share * tokens)]
    slots = torch.cat([slots, torch.full((dropped,), tokens)])
    ids = torch.randint(0, vocab, (tokens,), generator=g)
    weight, features = torch.randn(vocab, dim, generator=g), torch.randn(len(slots), dim, generator=g)
    sample = Sample((ids, weight, features, slots))
    assert not list(disagreements(OPS["splice_fwd"], sample, dtype, "triton"))


@pytest.mark.parametrize("count", [1, 15, 16, 17, 32, 100])
def test_a_frequent_token_is_summed_in_float32_and_in_order(count: int) -> None:
    """Runs that end on, before and after a tile of the sum; a bf16 sum of 1/128 would stall."""
    ids = torch.cat([torch.full((count,), 2), torch.tensor([0, 2, 4])])
    grad = torch.full((count + 3, 20), 1 / 128, dtype=torch.bfloat16)
    slots = torch.tensor([count])  # the 0 is covered by an image
    first, _ = kernels.splice_bwd(grad, ids, slots, 5, True, False)
    assert first[2].eq(torch.tensor((count + 1) / 128).bfloat16()).all() and first[4].eq(1 / 128).all()
    assert not first[[0, 1, 3]].any()
    noisy = torch.randn(count + 3, 20, generator=torch.Generator().manual_seed(0))
    twice = [kernels.splice_bwd(noisy, ids, slots, 5, True, False)[0] for _ in range(2)]
    assert torch.equal(*twice)


def test_values_that_a_gpu_cannot_check_are_seen_in_the_result() -> None:
    """On a CPU the op refuses them; on a GPU, where reading them would stall, no memory is read out of bounds."""
    ids, weight = torch.tensor([0, 9, -1, 9]), torch.ones(3, 4)
    out = kernels.splice_fwd(ids, weight, torch.zeros(2, 4), torch.tensor([3, -5]))
    assert out[0].eq(1).all() and out[1:3].isnan().all() and out[3].eq(0).all()


def test_large_tiles() -> None:
    g = torch.Generator().manual_seed(0)
    weight, features = torch.randn(4, 2100, generator=g), torch.randn(2, 2100, generator=g)
    args = (torch.tensor([3, 0, 0, 1, 3]), weight, features, torch.tensor([4, 2]))
    with force_backend("reference"):
        expected = splice(*args)
    with force_backend("triton"):
        assert torch.equal(splice(*args), expected)
