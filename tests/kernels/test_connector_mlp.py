"""The kernels of connector_mlp, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.agreement import TINY, cases, disagreements, name, runnable
from tinyllava_fast.kernels import connector_mlp as kernels
from tinyllava_fast.ops._op import OPS, Op, Sample
from tinyllava_fast.ops.connector_mlp import ACTIVATIONS

CASES = [case for case in cases() if case[0].module == "connector_mlp"]
FWD = OPS["connector_mlp_fwd"]


def test_names_are_in_one_order() -> None:
    assert kernels.KINDS == tuple(ACTIVATIONS)


@pytest.mark.parametrize("dtype", list(TINY), ids=name)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_agrees_with_float64(case: tuple[Op, Sample], dtype: torch.dtype) -> None:
    assert runnable(*case, dtype, "triton") is None
    assert not list(disagreements(*case, dtype, "triton"))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    d=st.integers(1, 70),
    o=st.integers(1, 40),
    activation=st.sampled_from(list(ACTIVATIONS)),
    biases=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from(list(TINY)),
)
def test_ragged(n: int, k: int, d: int, o: int, activation: str, biases: tuple[bool, bool], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(n)
    b1, b2 = (torch.randn(size, generator=g) if has else None for size, has in zip((d, o), biases, strict=True))
    args = (torch.randn(n, k, generator=g), torch.randn(d, k, generator=g), b1, torch.randn(o, d, generator=g), b2)
    assert not list(disagreements(FWD, Sample((*args, activation)), dtype, "triton"))


@pytest.mark.parametrize("want", [(False, False, False, True, False), (True, False, False, False, False)])
def test_only_what_is_wanted(want: tuple[bool, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    x, h, w1, w2, grad = (torch.randn(*s, generator=g) for s in ((19, 8), (19, 33), (33, 8), (5, 33), (19, 5)))
    every = kernels.connector_mlp_bwd(grad, x, h, w1, w2, "silu", [True] * 5)
    some = kernels.connector_mlp_bwd(grad, x, h, w1, w2, "silu", list(want))
    for got, full, wanted in zip(some, every, want, strict=True):
        assert torch.equal(got, full) if wanted else len(got) == 0
