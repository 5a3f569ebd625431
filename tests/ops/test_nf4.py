from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.agreement import distance
from tinyllava_fast.ops import NF4, dequantize_nf4, linear_nf4, quantize_nf4, unpack_nf4
from tinyllava_fast.ops._op import force_backend

BACKENDS = ("cpp", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantized(rows: int, columns: int, *, blocksize: int = 64, double: bool = False, seed: int = 0) -> tuple[Any, Any]:
    """bitsandbytes' own (packed, QuantState)."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.03
    return bnb.quantize_4bit(w, blocksize=blocksize, quant_type="nf4", compress_statistics=double)


def flat_dequantized(packed: Any, state: Any, dtype: torch.dtype) -> Tensor:
    """bitsandbytes on the weight as one row: right for every width, as its blocks run over the flattened weight."""
    size = state.shape[0] * state.shape[1]
    absmax = unpack_nf4(packed, state).absmax
    op = torch.ops.bitsandbytes.dequantize_4bit.default
    padded = packed.flatten()
    return op(padded, absmax, state.blocksize, "nf4", [1, 2 * padded.numel()], dtype).flatten()[:size].view(state.shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (7, 320), (300, 64), (1, 1152)])
def test_equals_bitsandbytes_to_the_bit(backend: str, dtype: torch.dtype, double: bool, shape: tuple[int, int]) -> None:
    packed, state = quantized(*shape, double=double)
    state.dtype = dtype
    with force_backend(backend):
        got = dequantize_nf4(*unpack_nf4(packed, state), dtype)
    assert torch.equal(got, bnb.dequantize_4bit(packed, state))


def test_quantized_scales_that_fill_no_whole_block_by_inductor() -> None:
    """324 scales in blocks of 256: the last 68 were once left unwritten in compiled code."""
    packed, state = quantized(144, 144, double=True)
    compiled = torch.compile(lambda packed: unpack_nf4(packed, state).absmax, fullgraph=True)
    assert torch.equal(compiled(packed), unpack_nf4(packed, state).absmax)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 1024])
@pytest.mark.parametrize("shape", [(5, 48), (3, 4304), (9, 96), (7, 37), (1, 1), (1, 2), (33, 130)])
def test_any_width_equals_the_flattened_weight(
    backend: str, double: bool, blocksize: int, shape: tuple[int, int]
) -> None:
    packed, state = quantized(*shape, double=double, blocksize=blocksize)
    for dtype in (torch.float32, torch.bfloat16):
        expected = flat_dequantized(packed, state, dtype)
        with force_backend(backend):
            got = dequantize_nf4(*unpack_nf4(packed, state), dtype)
        assert torch.equal(got, expected)


def test_denormals_are_kept() -> None:
    nf4 = unpack_nf4(*quantized(4, 128))
    tiny = nf4._replace(absmax=nf4.absmax * 1e-38)
    for dtype in (torch.float32, torch.bfloat16):
        with force_backend("reference"):
            expected = dequantize_nf4(*tiny, dtype)
        assert expected.any() and torch.equal(dequantize_nf4(*tiny, dtype), expected)


def test_storage_of_another_dtype_is_the_same_weight() -> None:
    w = torch.randn(8, 64)
    plain, wide = (bnb.quantize_4bit(w, quant_type="nf4", quant_storage=d) for d in (torch.uint8, torch.bfloat16))
    assert torch.equal(dequantize_nf4(*unpack_nf4(*plain)), dequantize_nf4(*unpack_nf4(*wide)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 16, 40])
@pytest.mark.parametrize("shape", [(40, 320), (6, 48), (5, 37), (700, 576), (9, 2112)])
def test_linear_equals_the_dense_product(n: int, shape: tuple[int, int], dtype: torch.dtype, threads: int) -> None:
    """Forward and backward, with several tiles for the largest shape in float32."""
    nf4 = unpack_nf4(*quantized(*shape))
    g = torch.Generator().manual_seed(n)
    x = torch.randn(shape[1], n, generator=g).t().to(dtype).requires_grad_()
    bias = torch.randn(shape[0], generator=g).to(dtype).requires_grad_()
    torch.set_num_threads(threads)
    try:
        y = linear_nf4(x, *nf4, bias)
        incoming = torch.randn(y.shape, generator=g).to(dtype)
        got = [y, *torch.autograd.grad(y, (x, bias), incoming)]
    finally:
        torch.set_num_threads(1)
    w = dequantize_nf4(*nf4, dtype)
    theirs = F.linear(x, w, bias)
    expected = [theirs, *torch.autograd.grad(theirs, (x, bias), incoming)]
    wide = [t.detach().double().requires_grad_() for t in (x, bias)]
    exact_y = F.linear(wide[0], w.double(), wide[1])
    exact = [exact_y, *torch.autograd.grad(exact_y, wide, incoming.double())]
    for ours, torchs, truth in zip(got, expected, exact, strict=True):
        scale = float(truth.detach().abs().max()) if truth.numel() else 1.0
        tolerance = 1e-6 if dtype == torch.float32 else 4e-3  # few rows take the weight unrounded
        assert ours.dtype == dtype
        assert distance(ours, truth) <= 2 * distance(torchs, truth) + tolerance * scale


def test_leading_dimensions_and_compiled_code() -> None:
    nf4 = unpack_nf4(*quantized(24, 64))
    x = torch.randn(2, 5, 64, requires_grad=True)
    compiled = torch.compile(linear_nf4, fullgraph=True, backend="aot_eager")
    y = compiled(x, *nf4)
    assert y.shape == (2, 5, 24)
    torch.testing.assert_close(y, F.linear(x, dequantize_nf4(*nf4, torch.float32)))
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert linear_nf4(x[0, 0], *nf4).shape == (24,)


def test_mistakes_are_named() -> None:
    packed, state = quantized(8, 64)
    nf4 = unpack_nf4(packed, state)
    x = torch.randn(3, 64)
    for wrong, message in (
        (nf4._replace(shape=(8, 66)), "256 packed bytes for a weight .8, 66.: 264"),
        (nf4._replace(absmax=nf4.absmax[1:]), "7 scales for 8 blocks of 64"),
        (nf4._replace(absmax=nf4.absmax.bfloat16()), "absmax must be float32, got bfloat16"),
        (nf4._replace(blocksize=63), "blocksize must be even"),
        (NF4(nf4.packed.int(), *nf4[1:]), "packed must be uint8, got int32"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_nf4(x, *wrong)
    with pytest.raises(ValueError, match="x has 32 columns, the weight has 64"):
        linear_nf4(x[:, :32], *nf4)
    with pytest.raises(ValueError, match="bias has 3 entries, the weight has 8 rows"):
        linear_nf4(x, *nf4, torch.zeros(3))
    with pytest.raises(ValueError, match="dtype must be a float"):
        dequantize_nf4(*nf4, torch.int32)
    with pytest.raises(ValueError, match="type 'fp4', expected 'nf4'"):
        unpack_nf4(*bnb.quantize_4bit(torch.randn(8, 64), quant_type="fp4"))
    with pytest.raises(ValueError, match=r"must be \[O, K\], got shape \[64\]"):
        unpack_nf4(*bnb.quantize_4bit(torch.randn(64), quant_type="nf4"))


@pytest.mark.parametrize("blocksize", [32, 64])
@pytest.mark.parametrize("shape", [(64, 128), (7, 320), (3, 37)])
def test_quantizes_as_bitsandbytes(shape: tuple[int, int], blocksize: int) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.03
    w[0] = 0
    expected = unpack_nf4(*bnb.quantize_4bit(w, blocksize=blocksize, quant_type="nf4"))
    got = quantize_nf4(w, blocksize)
    assert torch.equal(got.absmax, expected.absmax)
    assert torch.equal(dequantize_nf4(*got, torch.float32), dequantize_nf4(*expected, torch.float32))
