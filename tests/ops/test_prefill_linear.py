from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.ops.agreement import distance
from tinyllava_fast.ops import _cpp, quantize_int8
from tinyllava_fast.ops.linear import dense_weight
from tinyllava_fast.ops.prefill_linear import ACTIVATIONS, prefill_linear

SHAPES = ((96, 576), (37, 70), (130, 2080))  # outputs, columns


def made(rows: int, outputs: int, columns: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, columns + 3, generator=g)[:, 3:]  # rows do not touch one another
    w = torch.randn(outputs, columns, generator=g) / columns**0.5
    return [t.bfloat16() for t in (x, w, torch.randn(outputs, generator=g))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 17, 64, 300])
def test_equals_float64_in_bfloat16(rows: int, shape: tuple[int, int]) -> None:
    x, w, bias = made(rows, *shape)
    held = quantize_int8(w)
    for values, scale, weight in ((w, None, w), (held.values, held.scale, dense_weight(held, torch.float64))):
        exact = F.linear(x.double(), weight.double(), bias.double())
        allowed = 2 * distance(F.linear(x, weight.to(x.dtype), bias), exact) + 1e-3
        assert distance(prefill_linear.op(x, values, scale, bias, "none", None), exact) <= allowed


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_follows_is_as_good_as_torch(activation: str) -> None:
    x, w, bias = made(70, 108, 200)
    w = 4 * w
    exact = ACTIVATIONS[activation](F.linear(x.double(), w.double(), bias.double()))
    residual = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    for added in (None, residual):
        wanted = exact if added is None else exact + added.double()
        torchs = ACTIVATIONS[activation](F.linear(x, w, bias))
        torchs = torchs if added is None else added + torchs
        allowed = 2 * distance(torchs, wanted) + 1e-3
        assert distance(prefill_linear.op(x, w, None, bias, activation, added), wanted) <= allowed


def test_extremes_pass_through_the_activations() -> None:
    x = torch.tensor([[-300.0], [300.0], [float("nan")], [0.0]]).bfloat16().expand(4, 32).contiguous()
    w = torch.eye(32).bfloat16()
    for activation in ("gelu_tanh", "quick_gelu"):
        y = prefill_linear.op(x, w, None, None, activation, None)
        assert bool((y[[0, 3]].abs() < 1e-30).all() and (y[1] == 300).all() and y[2].isnan().all())


@pytest.mark.skipif(not _cpp.has_tiles(), reason="this CPU or TLF_ISA has no AMX tiles")
def test_a_row_depends_on_no_other() -> None:
    x, w, bias = made(200, 96, 576)
    together = prefill_linear.op(x, w, None, bias, "none", None)
    assert torch.equal(together[33:150], prefill_linear.op(x[33:150], w, None, bias, "none", None))
    x[5, 7] = float("nan")
    spoilt = prefill_linear.op(x, w, None, bias, "none", None)
    assert spoilt[5].isnan().all() and torch.equal(spoilt[6:], together[6:])


def test_refusals() -> None:
    x, w, bias = made(20, 9, 8)
    with pytest.raises(ValueError, match="activation 'gelu'; "):
        prefill_linear.op(x, w, None, bias, "gelu", None)
    with pytest.raises(ValueError, match="9 outputs, expected gate and up"):
        prefill_linear.op(x, w, None, bias, "silu_gate", None)
    with pytest.raises(ValueError, match="residual is"):
        prefill_linear.op(x, w, None, bias, "none", x)
    with pytest.raises(ValueError, match="x has 7 columns, the weight has 8"):
        prefill_linear.op(x[:, :7], w, None, bias, "none", None)
