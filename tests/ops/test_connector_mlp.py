from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.ops.agreement import distance, saved_bytes
from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._op import force_backend
from tinyllava_fast.ops.connector_mlp import ACTIVATIONS, connector_mlp

BACKENDS = ("cpp", "reference")


def problem(n: int, k: int = 12, d: int = 70, o: int = 9, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """x, w1, b1, w2, b2, each a leaf."""
    g = torch.Generator().manual_seed(n)
    shapes = ((n, k), (d, k), (d,), (o, d), (o,))
    return tuple(torch.randn(*shape, generator=g).to(dtype).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_two_layers(backend: str, activation: str) -> None:
    """Leading dimensions, two threads where the tensor is large enough for a team."""
    x, *rest = problem(1000)
    images = x.detach().view(4, 250, 12).requires_grad_()
    expected = F.linear(ACTIVATIONS[activation](F.linear(images, *rest[:2])), *rest[2:])
    incoming = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    torch.set_num_threads(2)
    try:
        with force_backend(backend):
            y = connector_mlp(images, *rest, activation)
            got = torch.autograd.grad(y, (images, *rest), incoming)
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(got, torch.autograd.grad(expected, (images, *rest), incoming), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes(activation: str) -> None:
    """Tails, zeros and what is not finite, one value a column: y and the slope are torch's."""
    values = torch.cat([torch.linspace(-12, 12, 5001), torch.tensor([0.0, 1e-30, -1e-30, -90.0, 90.0, 1e9, torch.nan])])
    w2 = torch.ones(1, len(values))
    one, w1 = torch.ones(1, 1), values[:, None].clone().requires_grad_()
    with force_backend("cpp"):
        (slope,) = torch.autograd.grad(connector_mlp(one, w1, None, w2, None, activation).sum(), w1)
    exact = values.double().requires_grad_()
    (truth,) = torch.autograd.grad(ACTIVATIONS[activation](exact).sum(), exact)
    assert torch.equal(slope[-1].isnan(), truth[-1:].isnan()) and distance(slope[:-1, 0], truth[:-1]) < 3e-6
    with force_backend("cpp"):
        a = connector_mlp(values[:-2, None], torch.ones(1, 1), None, torch.ones(1, 1), None, activation)
    assert distance(a[:, 0], ACTIVATIONS[activation](values[:-2].double())) < 3e-6


@pytest.mark.parametrize("wanted", range(1, 32))
def test_gradients_only_where_they_are_wanted(wanted: int) -> None:
    leaves = problem(70)
    full = torch.autograd.grad(connector_mlp(*leaves).sum(), leaves)
    given = [t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(leaves)]
    connector_mlp(*given).sum().backward()
    for leaf, truth in zip(given, full, strict=True):
        assert (leaf.grad is None) != leaf.requires_grad
        if leaf.grad is not None:  # for w2 alone the activation is torch's
            torch.testing.assert_close(leaf.grad, truth, atol=1e-4, rtol=1e-5)


def test_keeps_half_of_what_eager_keeps() -> None:
    x, w1, b1, w2, b2 = problem(512, 24, 40, 40)
    others = x.nbytes + w1.nbytes + w2.nbytes
    ours = saved_bytes(lambda: connector_mlp(x, w1, b1, w2, b2)) - others
    eager = saved_bytes(lambda: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)) - others
    assert ours == 512 * 40 * 4 == eager / 2


def test_backward_may_run_again() -> None:
    """The tensors that were kept are not written to."""
    leaves = problem(300)
    y = connector_mlp(*leaves)
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y.sum(), leaves)))


def test_trains_after_it_has_been_asked_in_inference_mode() -> None:
    """Its scratch memory outlives the mode in which it was first taken."""
    leaves = problem(400, d=90)
    _cpp._kept.__dict__.pop("connector_mlp", None)
    with torch.inference_mode():
        asked = connector_mlp(*leaves)
    y = connector_mlp(*leaves)
    y.sum().backward()
    assert torch.equal(y, asked) and all(leaf.grad is not None for leaf in leaves)


@pytest.mark.skipif(not _cpp.has_tiles(), reason="this CPU or TLF_ISA has no AMX tiles")
def test_takes_tiles_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of both weights, in bfloat16 and at a size that pays: rows, columns, depth."""
    taken = []
    real = _cpp.extension()
    spied = SimpleNamespace(**{name: getattr(real, name) for name in dir(real)})
    spied.gemm_tiles = lambda *args: (taken.append(args[-4:-1]), real.gemm_tiles(*args))[1]
    monkeypatch.setattr(_cpp, "extension", lambda: spied)
    x, w1, b1, w2, b2 = problem(512, 192, 256, 256, torch.bfloat16)
    connector_mlp(x.detach(), w1, b1, w2, b2).square().sum().backward()
    assert sorted(taken) == [(256, 192, 512), (256, 256, 512)]


def test_mistakes_are_named() -> None:
    x, w1, b1, w2, b2 = problem(4)
    for arguments, message in (
        ((x, w1[:, :3], b1, w2, b2), "do not multiply"),
        ((x, w1, b1, w2[:, :3], b2), "do not multiply"),
        ((x, w1, b1[:3], w2, b2), "b1 has 3 entries, its weight has 70 rows"),
        ((x, w1, b1, w2, b2[:3]), "b2 has 3 entries, its weight has 9 rows"),
        ((x, w1.bfloat16(), b1, w2, b2), "w1 must be float32, got bfloat16"),
        ((x, w1, b1, w2, b2, "gleu"), "activation 'gleu'; did you mean 'gelu'"),
    ):
        with pytest.raises(ValueError, match=message):
            connector_mlp(*arguments)
