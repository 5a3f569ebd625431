"""Passes over compiled graphs: they find what they are for, leave the rest, and change no result."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tinyllava_fast.ops import linear_cross_entropy, splice
from tinyllava_fast.ops.gemm import gemm
from tinyllava_fast.ops.splice import splice_bwd_add
from tinyllava_fast.train import graph_passes


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(graph_passes.TrainingPasses, "uuid", lambda self: None)  # a cached graph has met its passes
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradients(layer: nn.Module, x: Tensor, *, compiled: bool) -> list[Tensor]:
    layer = copy.deepcopy(layer)
    call = torch.compile(layer, fullgraph=True, options=graph_passes.options()) if compiled else layer
    call(x).float().square().sum().backward()
    return [p.grad for p in layer.parameters() if p.grad is not None]


def test_products_are_replaced_where_it_pays(monkeypatch) -> None:
    seen: list[tuple[int, ...]] = []

    def pays(left: Tensor, right: Tensor) -> bool:
        seen.append((*left.shape, right.shape[1]))
        return 48 in left.shape

    monkeypatch.setattr(graph_passes, "pays", pays)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 24, bias=False), nn.Linear(24, 24)).bfloat16()
    x = torch.randn(70, 32, dtype=torch.bfloat16)
    want = gradients(net, x, compiled=False)
    ran: list[tuple[int, ...]] = []
    kernel = gemm.cpp

    def run(*args: Tensor) -> Tensor:
        ran.append((*args[0].shape, args[1].shape[1], args[2] is not None))
        return kernel(*args)

    monkeypatch.setattr(gemm, "cpp", run)
    got = gradients(net, x, compiled=True)
    forward, inputs, weights = [(70, 32, 48), (70, 48, 24), (70, 24, 24)], [(70, 24, 48), (70, 24, 24)], [(48, 70, 32)]
    assert sorted(seen) == sorted(forward + inputs + weights + [(24, 70, 48), (24, 70, 24)])
    assert sorted(ran) == [(48, 70, 32, False), (70, 48, 24, False)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=0.05 * float(b.abs().max()), rtol=0)


def test_a_bias_is_taken_along(monkeypatch) -> None:
    monkeypatch.setattr(graph_passes, "pays", lambda *_: True)
    torch.manual_seed(0)
    layer = nn.Linear(64, 80).bfloat16().requires_grad_(False)
    ran: list[bool] = []
    kernel = gemm.cpp
    monkeypatch.setattr(gemm, "cpp", lambda *args: ran.append(args[2] is not None) or kernel(*args))
    x = torch.randn(70, 64, dtype=torch.bfloat16)
    got = torch.compile(layer, fullgraph=True, options=graph_passes.options())(x)
    assert ran == [True]
    torch.testing.assert_close(got, layer(x), atol=0.05, rtol=0)


def test_float32_products_stay_torchs(monkeypatch) -> None:
    monkeypatch.setattr(gemm, "cpp", lambda *_: pytest.fail("replaced"))
    layer, x = nn.Linear(128, 512), torch.randn(512, 128)
    for a, b in zip(gradients(layer, x, compiled=True), gradients(layer, x, compiled=False), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3 * float(b.abs().max()), rtol=0)


def test_rotary_tables_are_kept_and_change_nothing() -> None:
    class Rotated(nn.Module):
        def forward(self, x: Tensor, angles: Tensor) -> Tensor:
            cos, sin = (f(angles).mul(1.0).to(x.dtype) for f in (torch.cos, torch.sin))
            for _ in range(3):
                x = torch.tanh(x * cos[:, None] + x.flip(-1) * sin[:, None])
            return x

    sines: list[int] = []
    passes = graph_passes.TrainingPasses()

    class Counted(graph_passes.TrainingPasses):
        def __call__(self, graph: torch.fx.Graph) -> None:
            passes(graph)
            kept = graph.find_nodes(op="call_function", target=torch.ops.prims.inductor_force_stride_order.default)
            sines.append(len(kept))

    x, angles = torch.randn(5, 2, 8, requires_grad=True), torch.randn(5, 8)
    want = Rotated()(x, angles)
    (wanted,) = torch.autograd.grad(want.sum(), x)
    compiled = torch.compile(Rotated(), fullgraph=True, options={"post_grad_custom_post_pass": Counted()})
    got = compiled(x, angles)
    (grad,) = torch.autograd.grad(got.sum(), x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, wanted)
    assert sines and sines[0] == 2


class Tied(nn.Module):
    """An embedding that is the head as well, around one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(50, 16))

    def forward(self, ids: Tensor, features: Tensor, slots: Tensor) -> Tensor:
        hidden = torch.tanh(splice(ids, self.table, features, slots))
        return linear_cross_entropy(hidden, self.table, ids.flip(0), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learns", [False, True])
def test_a_tied_embedding_gets_one_gradient(monkeypatch, dtype, learns) -> None:
    torch.manual_seed(0)
    net, features = Tied().to(dtype), torch.randn(3, 16, dtype=dtype, requires_grad=learns)
    pack = (torch.randint(50, (20,)), features, torch.tensor([4, 5, 20]))
    ran: list[Tensor] = []
    kernel = splice_bwd_add.cpp
    monkeypatch.setattr(splice_bwd_add, "cpp", lambda *args: ran.append(args[0]) or kernel(*args))
    found = []
    for compiled in (False, True):
        twin = copy.deepcopy(net)
        call = torch.compile(twin, fullgraph=True, options=graph_passes.options()) if compiled else twin
        for _ in range(2):  # sums in place must not reach what autograd keeps
            twin.table.grad = features.grad = None
            (call(*pack) * 0.25).backward()
        found.append([twin.table.grad, *([features.grad] if learns else [])])
    assert len(ran) == 2
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
