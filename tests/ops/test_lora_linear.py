from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ops.agreement import distance
from tinyllava_fast.ops import dequantize_nf4, lora_linear
from tinyllava_fast.ops._op import force_backend
from tinyllava_fast.ops.nf4 import NF4, random_nf4

# the package exports the function under the module's name
MODULE = importlib.import_module("tinyllava_fast.ops.lora_linear")
BACKENDS = ("cpp", "reference")


def problem(n: int = 40, o: int = 24, k: int = 64, r: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """x, weight, bias, a, b, each a leaf."""
    g = torch.Generator().manual_seed(n)
    shapes = ((n, k), (o, k), (o,), (r, k), (o, r))
    return tuple(torch.randn(*shape, generator=g).to(dtype).requires_grad_() for shape in shapes)


def plain(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, scale: float, keep: Tensor | None, p: float) -> Any:
    """The formula with torch's own autograd."""
    dropped = x if keep is None else x * keep / (1 - p)
    return F.linear(x, w, bias) + F.linear(F.linear(dropped, a), b) * scale


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("n", [0, 1, 40, 1100])
@pytest.mark.parametrize("threads", [1, 2])
def test_equals_the_formula(backend: str, p: float, n: int, threads: int) -> None:
    leaves = problem(n)
    seed = torch.tensor(12345678901)
    keep = MODULE.dropout_mask(seed, n, 64, p) if p else None
    expected = plain(*leaves, 0.5, keep, p)
    incoming = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    torch.set_num_threads(threads)
    try:
        with force_backend(backend):
            y = lora_linear(*leaves, 0.5, p, seed)
            got = torch.autograd.grad(y, leaves, incoming)
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(got, torch.autograd.grad(expected, leaves, incoming), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_peft(dtype: torch.dtype) -> None:
    """peft's own layer without dropout, whose masks are not ours; no further from float64 than twice its error."""
    from peft.tuners.lora import Linear, LoraConfig

    x, w, bias, a, b = problem(33, dtype=dtype)
    base = nn.Linear(64, 24, dtype=dtype)
    base.weight, base.bias = nn.Parameter(w.detach()), nn.Parameter(bias.detach())
    layer: Any = Linear(base, "default", LoraConfig(r=8, lora_alpha=4), r=8, lora_alpha=4)
    layer.lora_A["default"].weight = nn.Parameter(a.detach())
    layer.lora_B["default"].weight = nn.Parameter(b.detach())
    trained = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    incoming = torch.randn(33, 24).to(dtype)
    theirs = layer(x)
    theirs = [theirs, *torch.autograd.grad(theirs, (x, *trained), incoming)]
    ours = lora_linear(x, w, bias, a, b, 0.5)
    ours = [ours, *torch.autograd.grad(ours, (x, a, b), incoming)]
    wide = tuple(t.detach().double().requires_grad_() for t in (x, w, bias, a, b))
    exact = plain(*wide, 0.5, None, 0.0)
    exact = [exact, *torch.autograd.grad(exact, (wide[0], wide[3], wide[4]), incoming.double())]
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype == dtype
        assert distance(mine, truth) <= 2 * distance(other, truth) + 1e-6 * float(truth.detach().abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(24, 64), (24, 48), (9, 37)])
def test_nf4_equals_its_dense_weight(backend: str, shape: tuple[int, int]) -> None:
    packed, absmax, *_ = random_nf4(torch.Generator().manual_seed(0), *shape, 64)
    nf4 = NF4(packed, absmax, shape)
    x, _, bias, a, b = problem(37, *shape)
    seed, leaves = torch.tensor(7), (x, bias, a, b)
    with force_backend(backend):
        y = lora_linear(x, nf4, bias, a, b, 2.0, 0.25, seed)
        got = [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]
        z = lora_linear(x, dequantize_nf4(*nf4, torch.float32), bias, a, b, 2.0, 0.25, seed)
        expected = [z, *torch.autograd.grad(z, leaves, torch.ones_like(z))]
    for ours, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, truth, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_is_the_same_everywhere(dtype: torch.dtype) -> None:
    """With W = 0 and A, B the identity, y is the masked x to the bit, and dx the masked gradient."""
    x = torch.randn(700, 48).to(dtype).requires_grad_()
    eye = torch.eye(48).to(dtype)
    for number in (0, 1, -3, 1 << 40, (1 << 62) - 1):
        seed = torch.tensor(number)
        keep = MODULE.dropout_mask(seed, 700, 48, 0.5)
        y = lora_linear(x, torch.zeros_like(eye), None, eye, eye, 0.5, 0.5, seed)
        assert torch.equal(y, x * keep)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(dx, keep.to(dtype))


def test_the_mask_is_random() -> None:
    """Shares of kept elements, of whole rows and columns, and agreement between rows and seeds, within 5 sigma."""
    rows, columns, p = 2048, 512, 0.3
    keep = MODULE.dropout_mask(torch.tensor(99), rows, columns, p).double()
    other = MODULE.dropout_mask(torch.tensor(100), rows, columns, p).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 5 * sigma / (rows * columns) ** 0.5
    assert (keep.mean(0) - (1 - p)).abs().max() < 5 * sigma / rows**0.5
    assert (keep.mean(1) - (1 - p)).abs().max() < 5 * sigma / columns**0.5
    for u, v in ((keep, other), (keep[1:], keep[:-1]), (keep[:, 1:], keep[:, :-1])):
        covariance = ((u - (1 - p)) * (v - (1 - p))).mean()
        assert abs(covariance) < 5 * sigma**2 / u.numel() ** 0.5


def test_gradients_only_where_they_are_wanted() -> None:
    x, w, bias, a, b = problem()
    x, w, bias = x.detach(), w.detach(), bias.detach()
    lora_linear(x, w, bias, a, b, 1.0).sum().backward()
    assert x.grad is None and w.grad is None and bias.grad is None
    assert a.grad is not None and b.grad is not None
    assert not lora_linear(x, w, bias, a.detach(), b.detach(), 1.0).requires_grad


def test_a_drawn_seed_follows_torchs_generator() -> None:
    leaves = problem(k=64)
    torch.manual_seed(3)
    first, second = (lora_linear(*leaves, 1.0, 0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(lora_linear(*leaves, 1.0, 0.5), first) and not torch.equal(first, second)


def test_leading_dimensions_and_compiled_code() -> None:
    x, w, bias, a, b = problem(30)
    seed = torch.tensor(4)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    y = compiled(x.view(2, 15, 64), w, bias, a, b, 0.5, 0.1, seed)
    torch.testing.assert_close(y.view(30, 24), lora_linear(x, w, bias, a, b, 0.5, 0.1, seed))
    got = torch.autograd.grad(y.sum(), (x, a, b))
    expected = torch.autograd.grad(lora_linear(x, w, bias, a, b, 0.5, 0.1, seed).sum(), (x, a, b))
    for ours, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, truth)
    assert compiled(x, w, bias, a, b, 0.5, 0.1).shape == (30, 24)


def test_mistakes_are_named() -> None:
    x, w, bias, a, b = problem()
    for arguments, message in (
        ((x, w, bias, a[:, :3], b, 1.0), "do not multiply"),
        ((x, w[:3], bias, a, b, 1.0), "weight is .3, 64., the adapter is for .24, 64."),
        ((x, w, bias[:2], a, b, 1.0), "bias has 2 entries, the weight has 24 rows"),
        ((x, w, bias, a.bfloat16(), b, 1.0), "a must be float32, got bfloat16"),
        ((x, w, bias, a, b, 1.0, 1.0, torch.tensor(0)), "dropout_p must be at least 0 and below 1, got 1.0"),
        ((x, w, bias, a, b, 1.0, 0.1, torch.tensor([0])), "seed must be one int64 number"),
    ):
        with pytest.raises(ValueError, match=message):
            lora_linear(*arguments)
