"""Unpacking NF4 and lora_linear's kernels, interpreted, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.agreement import TINY, cases, disagreements, name, runnable
from tinyllava_fast.kernels import lora_linear as kernels
from tinyllava_fast.kernels import nf4
from tinyllava_fast.ops._op import OPS, Op, Sample
from tinyllava_fast.ops.lora_linear import dropout_mask
from tinyllava_fast.ops.nf4 import NF4, dense, random_nf4

CASES = [case for case in cases() if case[0].module in ("nf4", "lora_linear")]


@pytest.mark.parametrize("dtype", list(TINY), ids=name)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_agrees_with_float64(case: tuple[Op, Sample], dtype: torch.dtype) -> None:
    assert runnable(*case, dtype, "triton") is None
    assert not list(disagreements(*case, dtype, "triton"))


@pytest.mark.parametrize("dtype", list(TINY), ids=name)
@pytest.mark.parametrize("shape", [(70, 64), (33, 37), (1, 1), (9, 480)])
def test_unpacks_to_the_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed, absmax, rows, columns, blocksize = random_nf4(torch.Generator().manual_seed(0), *shape, 64)
    exact = dense(NF4(packed, absmax, (rows, columns), blocksize), dtype)
    assert torch.equal(nf4.dequantize_nf4(packed, absmax, rows, columns, blocksize, dtype), exact)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 50),
    o=st.integers(1, 40),
    r=st.integers(1, 40),
    p=st.sampled_from([0.0, 0.3]),
    packed=st.booleans(),
    dtype=st.sampled_from(list(TINY)),
)
def test_ragged(n: int, k: int, o: int, r: int, p: float, packed: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(n)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g)

    codes, absmax, _, _, blocksize = random_nf4(g, o, k, 64)
    base: tuple[Any, ...] = (None, codes, absmax, blocksize) if packed else (randn(o, k), None, None, 0)
    args = (randn(n, k), *base, randn(o), randn(r, k), randn(o, r), 0.5, p, torch.tensor(n << 33))
    sample = Sample(args, kept=(3,) if packed else ())
    assert not list(disagreements(OPS["lora_linear_fwd"], sample, dtype, "triton"))


@pytest.mark.parametrize("number", [0, 1, -3, 1 << 40, (1 << 62) - 1])
def test_the_mask_is_that_of_every_backend(number: int) -> None:
    """With A and W the identity, u is the masked x to the bit."""
    x, eye, seed = torch.randn(70, 40), torch.eye(40), torch.tensor(number)
    _, u = kernels.lora_linear_fwd(x, eye, None, None, 0, None, eye, eye, 1.0, 0.5, seed)
    keep = dropout_mask(seed, 70, 40, 0.5)
    assert torch.equal(u, x * keep)
    made = kernels.lora_linear_bwd(
        x, x, eye, None, None, 0, eye, eye, u, 1.0, 0.5, seed, [True, False, False, True, True]
    )
    torch.testing.assert_close(made[0], x + 2 * x * keep)
    torch.testing.assert_close(made[3], 2 * x.t() @ (x * keep), atol=1e-4, rtol=1e-5)
