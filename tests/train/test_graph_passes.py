"""Passes over compiled graphs: they find what they are for, leave the rest, and change no result."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tinyllava_fast.ops.weight_gradient import pays, weight_gradient
from tinyllava_fast.train import graph_passes


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(graph_passes.WeightGradients, "uuid", lambda self: None)  # a cached graph has met its passes
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradients(layer: nn.Module, x: Tensor, *, compiled: bool) -> list[Tensor]:
    layer = copy.deepcopy(layer)
    call = torch.compile(layer, fullgraph=True, options=graph_passes.options()) if compiled else layer
    call(x).float().square().sum().backward()
    return [p.grad for p in layer.parameters() if p.grad is not None]


def test_weight_gradients_are_replaced_where_it_pays(monkeypatch) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(graph_passes, "pays", lambda *shape: calls.append(shape[:3]) or shape[1] == 48)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 24, bias=False)).bfloat16()
    x = torch.randn(70, 32, dtype=torch.bfloat16)
    want = gradients(net, x, compiled=False)
    ran: list[tuple[int, ...]] = []
    kernel = weight_gradient.cpp
    monkeypatch.setattr(weight_gradient, "cpp", lambda *args: ran.append(args[0].shape) or kernel(*args))
    got = gradients(net, x, compiled=True)
    assert sorted(calls) == [(70, 24, 48), (70, 48, 32)]
    assert ran == [(70, 48)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=0.05 * float(b.abs().max()), rtol=0)


def test_what_pays() -> None:
    assert not pays(3584, 1536, 576, torch.float32)
    assert not pays(3584, 1536, 16, torch.bfloat16)
    assert not pays(64, 128, 128, torch.bfloat16)
