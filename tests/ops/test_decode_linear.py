from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.ops.agreement import distance
from tinyllava_fast.ops import NF4, Int8, decode_linear, quantize_int8, quantize_nf4
from tinyllava_fast.ops.decode_linear import decode_linear_fwd, dense_weight, dequantize_int8, in_huge_pages

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
    for rows in (0, *range(1, 18)):
        x, w, bias = made(*shape, rows, dtype)
        held = FORMATS[kind](w)
        exact = F.linear(x.double(), dense_weight(held, torch.float64), bias.double())
        torchs = F.linear(x, dense_weight(held, dtype), bias)
        scale = float(exact.abs().max()) if rows else 1.0
        allowed = 2 * distance(torchs, exact) + (1e-6 if dtype == torch.float32 else 1e-3) * scale
        assert distance(decode_linear(x, held, bias), exact) <= allowed, rows
        shifted = decode_linear(x.t().contiguous().t(), held)
        assert distance(shifted, exact - bias.double()) <= allowed, rows


def test_leading_dimensions_and_an_outlier_beside_int8() -> None:
    x, w, _ = made(64, 256, 6, torch.bfloat16)
    x[0, 7] = 300.0
    held = quantize_int8(w)
    exact = F.linear(x.double(), dense_weight(held, torch.float64))
    got = decode_linear(x.view(2, 3, 256), held)
    assert got.shape == (2, 3, 64)
    assert bool(distance(got.view(6, 64)[0], exact[0]) <= 5e-3 * exact[0].abs().max())
    assert distance(got.view(6, 64)[1:], exact[1:]) <= 5e-3 * float(exact[1:].abs().max())


@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_nan_and_infinity_reach_their_row_alone(kind: str) -> None:
    x, w, _ = made(32, 64, 7, torch.bfloat16)
    x = x.contiguous()
    x[2, 5], x[4, 9] = float("nan"), float("inf")
    got = decode_linear(x, FORMATS[kind](w))
    assert not got[[2, 4]].isfinite().any() and got[[0, 1, 3, 5, 6]].isfinite().all()


def test_int8_rounds_to_the_nearest_step() -> None:
    w = torch.randn(9, 40, generator=torch.Generator().manual_seed(1))
    w[3] = 0
    held = quantize_int8(w)
    back = dequantize_int8(*held, torch.float32)
    assert held.values.dtype == torch.int8 and int(held.values.abs().max()) == 127
    assert bool(((back - w).abs() <= held.scale[:, None] * 0.5001).all()) and not back[3].any()


def test_refusals() -> None:
    x, w, bias = made(4, 8, 2, torch.float32)
    with pytest.raises(ValueError, match="has no backward"):
        decode_linear(x.clone().requires_grad_(), w)
    with pytest.raises(ValueError, match="x has 8 columns, the weight has 7"):
        decode_linear(x, w[:, :7])
    with pytest.raises(ValueError, match="bias has 3 entries for 4 outputs"):
        decode_linear(x, w, bias[:3])
    with pytest.raises(ValueError, match="weight must be bfloat16"):
        decode_linear(x.bfloat16(), w)
    with pytest.raises(ValueError, match="scale has 3 entries"):
        decode_linear(x, Int8(w.to(torch.int8), torch.ones(3)))
    with pytest.raises(ValueError, match="at most 16"):
        decode_linear_fwd.op(x.repeat(9, 1), w, None, None)


@torch.inference_mode()
def test_traces_whole_and_copies_to_huge_pages() -> None:
    x, w, bias = made(16, 64, 3, torch.float32)
    compiled = torch.compile(decode_linear, fullgraph=True, backend="aot_eager")
    for held in (w, quantize_int8(w), quantize_nf4(w)):
        assert torch.equal(compiled(x, held, bias), decode_linear(x, held, bias))
    assert isinstance(quantize_nf4(w), NF4)
    assert torch.equal(in_huge_pages(w), w) and in_huge_pages(w).data_ptr() != w.data_ptr()
