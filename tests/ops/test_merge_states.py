"""Merged partial attention against one attention over all keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tinyllava_fast.ops import merge_states, packed_attention
from tinyllava_fast.ops._op import force_backend


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def halves(q: Tensor, k: Tensor, v: Tensor, cut: int) -> list[tuple[Tensor, Tensor]]:
    """Attention over the keys before the cut, behind it, and over all of them."""
    bounds = torch.tensor([0, len(q)]).int()

    def over(a: int, b: int) -> tuple[Tensor, Tensor]:
        return packed_attention(q, k[a:b], v[a:b], bounds, torch.tensor([0, b - a]).int(), causal=False)

    return [over(0, cut), over(cut, len(k)), over(0, len(k))]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("cut", [0, 1, 11, 30])
def test_two_halves_equal_the_whole(backend: str, cut: int) -> None:
    q, k, v = (rand(n, h, 16, seed=i).requires_grad_() for i, (n, h) in enumerate(((10, 4), (30, 2), (30, 2))))
    with force_backend(backend):
        a, b, whole = halves(q, k, v, cut)
        merged = merge_states(*a, *b)
        weights = (rand(10, 4, 16, seed=7), rand(10, 4, seed=8))
        grads = [torch.autograd.grad(x, (q, k, v), weights) for x in (merged, whole)]
    for got, want in zip((*merged, *grads[0]), (*whole, *grads[1]), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_nothing_on_both_sides_is_nothing(backend: str) -> None:
    out, empty = torch.zeros(3, 2, 8), torch.full((3, 2), -torch.inf)
    with force_backend(backend):
        merged, lse = merge_states(out, empty, out, empty)
    assert (merged == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_nan_is_not_swallowed(backend: str) -> None:
    out, lse = rand(3, 2, 8), rand(3, 2)
    bad = lse.clone()
    bad[1] = torch.nan
    with force_backend(backend):
        for given in ((out, lse, out, bad), (out, bad, out, lse)):
            merged, total = merge_states(*given)
            assert merged[1].isnan().all() and total[1].isnan().all() and merged[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"out_b": rand(3, 2, 9)}, r"out_b must be \[3, 2, 8\] as out_a has it, got \[3, 2, 9\]"),
        ({"lse_a": rand(2, 3)}, r"lse_a must be \[3, 2\]"),
        ({"out_b": rand(3, 2, 8).half()}, "out_b must be float32"),
        ({"lse_b": rand(3, 2, 1)}, r"lse_b must be \[T, H\]"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], text: str) -> None:
    given = {"out_a": rand(3, 2, 8), "lse_a": rand(3, 2), "out_b": rand(3, 2, 8), "lse_b": rand(3, 2), **change}
    with pytest.raises(ValueError, match=f"^merge_states: {text}"):
        merge_states(**given)
