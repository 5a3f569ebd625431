"""The adapter's products against float64, in C++ where this machine has the kernels and in torch everywhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.ops.agreement import distance
from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops import _lora_products as products
from tinyllava_fast.ops.lora_linear import dropout_mask, dropout_threshold

SHAPES = [(0, 8, 2), (1, 2, 2), (1, 96, 16), (25, 34, 2), (47, 64, 6), (129, 130, 16), (300, 66, 18), (70, 200, 130)]
P = 0.4


@pytest.fixture(params=["as chosen", "torch"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernels, where the machine has them, then torch's products."""
    if request.param == "torch":
        monkeypatch.setattr(_cpp, "isa", lambda: "avx512")
    yield request.param


def draw(*shape: int, seed: int = 0) -> Tensor:
    """bfloat16 whose rows lie among other columns."""
    wide = torch.randn(shape[0], 2 * shape[1] + 3, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return wide.bfloat16()[:, 3 : 3 + shape[1]]


def masks(rows: int, columns: int) -> Iterator[tuple[products.Mask, Tensor]]:
    """No mask and one, as the products take it and as numbers."""
    yield products.WHOLE, torch.ones(rows, columns).double()
    seed = torch.tensor(-(9 << 33) + 5)
    yield products.Mask(int(seed), dropout_threshold(P)), dropout_mask(seed, rows, columns, P).double()


def holds(got: Tensor, exact: Tensor, size: Tensor) -> None:
    """Within two roundings to bfloat16 and what float32 sums lose; size: the sums of absolute values."""
    assert got.is_contiguous() and got.shape == exact.shape
    if got.numel():
        assert distance(got, exact) <= 2**-7 * float(exact.abs().max()) + 1e-5 * float(size.max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lies", [True, False], ids=["lies", "turned"])
@pytest.mark.parametrize("threads", [1, 2])
def test_down(shape: tuple[int, int, int], lies: bool, threads: int) -> None:
    rows, columns, rank = shape
    x, factor = draw(rows, columns), draw(columns, rank) if lies else draw(rank, columns).t()
    torch.set_num_threads(threads)
    for mask, keep in masks(rows, columns):
        kept, wide = x.double() * keep, factor.double()
        holds(products.down(x, factor, 0.7, mask), 0.7 * kept @ wide, kept.abs() @ wide.abs())
    torch.set_num_threads(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lies", [True, False], ids=["lies", "turned"])
def test_up(shape: tuple[int, int, int], lies: bool) -> None:
    rows, columns, rank = shape
    u, held = draw(rows, rank).contiguous(), draw(rows, columns, seed=1)
    factor = draw(rank, columns) if lies else draw(columns, rank).t()
    exact, size = 1.5 * u.double() @ factor.double(), u.double().abs() @ factor.double().abs() + 9
    for mask, keep in masks(rows, columns):
        holds(products.up(u, factor, 1.5, mask), exact * keep, size)
        into = held.clone(memory_format=torch.contiguous_format)
        products.add_up(u, factor, 1.5, into, mask)
        holds(into, held.double() + exact * keep, size)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_grad(shape: tuple[int, int, int], turned: bool, threads: int) -> None:
    rows, columns, rank = shape
    left, right = draw(rows, rank).contiguous(), draw(rows, columns, seed=1)
    torch.set_num_threads(threads)
    for mask, keep in masks(rows, columns):
        kept = right.double() * keep
        exact, size = 0.3 * left.double().t() @ kept, left.double().abs().t() @ kept.abs()
        got = products.grad(left, right, 0.3, mask, turned=turned)
        holds(got, exact.t() if turned else exact, size)
    torch.set_num_threads(1)
