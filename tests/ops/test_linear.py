from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.ops.agreement import distance
from tinyllava_fast.ops import Int8, linear, quantize_int8, quantize_nf4
from tinyllava_fast.ops._policy import most_rows
from tinyllava_fast.ops.linear import dense_weight
from tinyllava_fast.ops.prefill_linear import ACTIVATIONS

FORMATS = {"dense": lambda w: w, "int8": quantize_int8, "nf4": quantize_nf4}
SHAPES = ((48, 576), (37, 128), (130, 70), (16, 34), (3, 2), (7, 2140))  # outputs, columns


def made(outputs: int, columns: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, columns + 3, generator=g)[:, 3:]  # rows do not touch one another
    return (
        x.to(dtype),
        torch.randn(outputs, columns, generator=g).to(dtype),
        torch.randn(outputs, generator=g).to(dtype),
    )


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64_for_any_number_of_rows(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    for rows in (0, *range(1, 18), 65, 80):
        x, w, bias = made(*shape, rows, dtype)
        held = FORMATS[kind](w)
        exact = F.linear(x.double(), dense_weight(held, torch.float64), bias.double())
        torchs = F.linear(x, dense_weight(held, dtype), bias)
        scale = float(exact.abs().max()) if rows else 1.0
        allowed = 2 * distance(torchs, exact) + (1e-6 if dtype == torch.float32 else 1e-3) * scale
        assert distance(linear(x, held, bias), exact) <= allowed, rows
        shifted = linear(x.t().contiguous().t(), held)
        assert distance(shifted, exact - bias.double()) <= allowed, rows


def test_leading_dimensions_and_an_outlier_beside_int8() -> None:
    x, w, _ = made(64, 256, 6, torch.bfloat16)
    x[0, 7] = 300.0
    held = quantize_int8(w)
    exact = F.linear(x.double(), dense_weight(held, torch.float64))
    got = linear(x.view(2, 3, 256), held)
    assert got.shape == (2, 3, 64)
    assert bool(distance(got.view(6, 64)[0], exact[0]) <= 5e-3 * exact[0].abs().max())
    assert distance(got.view(6, 64)[1:], exact[1:]) <= 5e-3 * float(exact[1:].abs().max())


@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_nan_and_infinity_reach_their_row_alone(kind: str) -> None:
    x, w, _ = made(32, 64, 7, torch.bfloat16)
    x = x.contiguous()
    x[2, 5], x[4, 9] = float("nan"), float("inf")
    got = linear(x, FORMATS[kind](w))
    assert not got[[2, 4]].isfinite().any() and got[[0, 1, 3, 5, 6]].isfinite().all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_follows_the_product(kind: str, activation: str) -> None:
    for dtype, rows in ((torch.float32, 3), (torch.float32, 70), (torch.bfloat16, 3), (torch.bfloat16, 70)):
        x, w, bias = made(48, 128, rows, dtype)
        held = FORMATS[kind](w)
        exact = ACTIVATIONS[activation](F.linear(x.double(), dense_weight(held, torch.float64), bias.double()))
        residual = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        for added in (None, residual):
            wanted = exact if added is None else exact + added.double()
            torchs = ACTIVATIONS[activation](F.linear(x, dense_weight(held, dtype), bias))
            allowed = 2 * distance(torchs if added is None else added + torchs, wanted)
            allowed += (1e-6 if dtype == torch.float32 else 4e-3) * float(exact.abs().max())
            got = linear(x, held, bias, activation=activation, residual=added)
            assert distance(got, wanted) <= allowed, (dtype, rows)


@pytest.mark.parametrize("rows", [6, 80])
def test_leading_dimensions_of_a_residual(rows: int) -> None:
    x, w, bias = made(48, 64, rows, torch.bfloat16)
    residual = torch.ones(2, rows // 2, 24).bfloat16()
    got = linear(x.view(2, rows // 2, 64), w, bias, activation="silu_gate", residual=residual)
    flat = linear(x, w, bias, activation="silu_gate", residual=residual.view(rows, 24))
    assert got.shape == residual.shape and torch.equal(got.view(rows, 24), flat)


def test_refusals() -> None:
    x, w, bias = made(4, 8, 2, torch.float32)
    with pytest.raises(ValueError, match="has no backward"):
        linear(x.clone().requires_grad_(), w)
    with pytest.raises(ValueError, match="x has 8 columns, the weight has 7"):
        linear(x, w[:, :7])
    with pytest.raises(ValueError, match="bias has 3 entries for 4 outputs"):
        linear(x, w, bias[:3])
    with pytest.raises(ValueError, match="weight must be bfloat16"):
        linear(x.bfloat16(), w)
    with pytest.raises(ValueError, match="scale has 3 entries"):
        linear(x, Int8(w.to(torch.int8), torch.ones(3)))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traces_whole(dtype: torch.dtype) -> None:
    """Whatever the number of rows, also beyond those that are few."""
    w, bias = made(16, 64, 3, dtype)[1:]
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for held in (w, quantize_int8(w), quantize_nf4(w)):
        for rows in (3, most_rows("decode_linear") + 4, most_rows("decode_linear int8") + 4):
            x = made(16, 64, rows, dtype)[0]
            assert torch.equal(compiled(x, held, bias), linear(x, held, bias))
