"""The row kernel of the loss, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.agreement import TINY, cases, disagreements, name, runnable
from tinyllava_fast.kernels import linear_cross_entropy as kernels
from tinyllava_fast.ops._op import OPS, Op, Sample

CASES = [case for case in cases() if case[0].module == "linear_cross_entropy"]
FWD = OPS["linear_cross_entropy_fwd"]


def sample(
    t: int, v: int, d: int, *scalars: float, slots: bool = True, bias: bool = True, share: float = 0.6
) -> Sample:
    g = torch.Generator().manual_seed(t + v)
    labels = torch.randint(0, v, (t,), generator=g)
    labels[torch.rand(t, generator=g) >= share] = -100
    rows = torch.arange(0, t, 2) if slots else None  # some of them with an ignored label
    hidden, weight = torch.randn(t, d, generator=g), torch.randn(v, d, generator=g)
    b = torch.randn(v, generator=g) if bias else None
    return Sample((hidden, weight, b, labels, rows, -100, *scalars, True, True, bias, True))


@pytest.mark.parametrize("dtype", list(TINY), ids=name)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_agrees_with_float64(case: tuple[Op, Sample], dtype: torch.dtype) -> None:
    assert runnable(*case, dtype, "triton") is None
    assert not list(disagreements(*case, dtype, "triton"))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    t=st.integers(1, 20),
    v=st.integers(1, 400),
    cap=st.sampled_from([0.0, 0.5, 30.0]),
    smooth=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    flags=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from(list(TINY)),
)
def test_ragged(
    t: int, v: int, cap: float, smooth: float, z_loss: float, flags: tuple[bool, bool], dtype: torch.dtype
) -> None:
    given_sample = sample(t, v, 8, cap, smooth, z_loss, slots=flags[0], bias=flags[1])
    assert not list(disagreements(FWD, given_sample, dtype, "triton"))


@pytest.mark.parametrize("dtype", list(TINY), ids=name)
def test_several_blocks_and_several_chunks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A vocabulary of four blocks and a bit, three rows a chunk: the running maximum and the float32 sums."""
    monkeypatch.setattr(kernels, "BLOCK", 128)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 3 * 530 * dtype.itemsize)
    for scalars in ((0.0, 0.0, 0.0), (3.0, 0.1, 1e-3)):
        assert not list(disagreements(FWD, sample(19, 530, 16, *scalars, slots=False), dtype, "triton"))


def turned(z: Tensor, labels: list[int]) -> tuple[Tensor, Tensor]:
    loss = torch.empty(len(z))
    kernels._turn(z, torch.tensor(labels), loss, -100, 0.0, 0.0, 0.0, True)
    return loss, z


def test_confident_and_hopeless_rows() -> None:
    """No overflow, and softmax - 1 keeps its digits where it is 1e-20."""
    z = torch.tensor([[60.0, 10.0, 0.0], [60.0, 10.0, 0.0], [-60.0, -60.0, -60.0]])
    exact = z.double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(exact, torch.tensor([0, 1, 2]), reduction="none")
    (expected,) = torch.autograd.grad(truth.sum(), exact)
    loss, dz = turned(z, [0, 1, 2])
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dz[0, 0].double(), -expected[0, 1:].sum(), rtol=1e-4, atol=0)
    torch.testing.assert_close(dz.double(), expected, rtol=1e-4, atol=1e-9)


def test_masked_vocabulary_entries_get_no_gradient() -> None:
    """-inf marks entries that can never be right, a whole block of them too."""
    z = torch.full((1, 300), -torch.inf)
    z[0, 200:203] = torch.tensor([1.0, 2.0, 3.0])
    loss, dz = turned(z, [201])
    assert dz[0, :200].eq(0).all() and dz[0, 203:].eq(0).all()
    truth = torch.nn.functional.cross_entropy(torch.tensor([[1.0, 2, 3]]), torch.tensor([1]))
    torch.testing.assert_close(loss[0], truth)


def test_ignored_rows_count_nothing_and_unknown_labels_show() -> None:
    loss, dz = turned(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), [-100, 5, 2])
    assert loss[0] == 0 and dz[0].eq(0).all()
    assert loss[1].isnan() and not loss[2].isnan()
    nan = torch.full((1, 5), torch.nan)
    assert turned(nan, [1])[0].isnan().all()
