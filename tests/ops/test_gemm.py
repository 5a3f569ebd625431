from __future__ import annotations

import pytest
import torch

from tests.ops.agreement import distance
from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops.gemm import gemm, pays, product, transposed

SHAPES = (
    (300, 96, 70),
    (33, 576, 200),  # a whole panel beside rows that lack some
    (64, 1100, 330),  # pieces of the depth, groups of sums
    (800, 1090, 100),  # several ranges of rows, sums of several depths where the left factor lies transposed
    (40, 5500, 150),  # more depth than is laid out at once
)


def factors(m: int, k: int, n: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(m)
    return [t.bfloat16() for t in (torch.randn(m, k, generator=g), torch.randn(k, n, generator=g))]


@pytest.mark.parametrize("turned", [(False, True), (False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64_however_the_factors_lie(shape: tuple[int, int, int], turned: tuple[bool, bool]) -> None:
    left, right = (t.t().contiguous().t() if f else t for t, f in zip(factors(*shape), turned, strict=True))
    bias = right[0].clone()
    exact = left.double() @ right.double() + bias.double()
    allowed = 2 * distance(torch.addmm(bias, left, right), exact) + 1e-3
    assert distance(gemm.op(left, right, bias), exact) <= allowed


@pytest.mark.parametrize("turned", [False, True])
def test_results_do_not_depend_on_threads(turned: bool) -> None:
    left, right = factors(200, 1100, 130)
    left = left.t().contiguous().t() if turned else left
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gemm.op(left, right, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_row_spoils_no_other() -> None:
    left, right = factors(70, 64, 96)
    clean = gemm.op(left, right, None)
    left[33, 7] = float("nan")
    spoilt = gemm.op(left, right, None)
    assert spoilt[33].isnan().all()
    assert torch.equal(spoilt[:33], clean[:33]) and torch.equal(spoilt[34:], clean[34:])


def test_it_pays_where_the_elements_of_a_line_are_adjacent() -> None:
    x, w = torch.empty(3584, 576, dtype=torch.bfloat16), torch.empty(1536, 576, dtype=torch.bfloat16)
    assert pays(x, w.t()) == _cpp.has_tiles()
    assert not pays(x[:, ::2], w.t()[::2])


def test_refusals() -> None:
    left, right = factors(4, 6, 5)
    with pytest.raises(ValueError, match="left has 6 columns, right has 5 rows"):
        gemm.op(left, right[:5], None)
    with pytest.raises(ValueError, match="bias has 4 entries, right has 5 columns"):
        gemm.op(left, right, right[0, :4])
    with pytest.raises(ValueError, match="right must be bfloat16"):
        gemm.op(left, right.float(), None)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (64, 64), (65, 130), (300, 700)])
def test_transposed(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape[0], shape[1] + 3).bfloat16()[:, 3:]
    for given in (matrix, matrix.contiguous().t(), matrix[::2]):
        got = transposed(given)
        assert got.is_contiguous() and torch.equal(got, given.t())


@pytest.mark.parametrize("rows", [16, 200])
def test_product_of_a_transposed_left_factor(rows: int) -> None:
    """Whatever it is made by on this machine."""
    left, right = factors(900, rows, 96)[0], factors(900, 96, 130)[0][:, :96]
    exact = left.t().double() @ right.double()
    assert distance(product(left.t(), right), exact) <= 2 * distance(left.t() @ right, exact) + 1e-3
