"""peft's layers through lora_linear: the same numbers, less memory, gradients of nothing that is frozen."""

from __future__ import annotations

import logging
from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tests.ops.agreement import distance, saved_bytes
from tinyllava_fast.log import log
from tinyllava_fast.models.adapter_forward import bind

K, O, ROWS = 128, 64, 40  # noqa: E741


def quantized(linear: nn.Linear, kind: str, nested: bool) -> nn.Module:
    import bitsandbytes as bnb

    layer: bnb.nn.Linear8bitLt | bnb.nn.Linear4bit
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(K, O, bias=True, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False)
    else:
        layer = bnb.nn.Linear4bit(K, O, bias=True, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(linear.weight.data, quant_type="nf4", compress_statistics=nested, module=layer)
    layer.bias = linear.bias
    layer.weight = layer.weight.to("cpu")  # this is where it quantizes
    return layer


def adapted(kind: str = "dense", *, dropout: float = 0.0, bound: bool = True, **settings: object) -> LoraLayer:
    """One adapted layer with its input width K and output width O, alike for every call."""
    torch.manual_seed(0)
    linear: nn.Module = nn.Linear(K, O)
    if kind != "dense":
        linear = quantized(linear, kind, kind == "nf4, double")
    model = nn.Sequential(OrderedDict(layer=linear))
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = True
    config = LoraConfig(**{"r": 8, "lora_alpha": 12, "lora_dropout": dropout, "target_modules": ["layer"], **settings})
    inject_adapter_in_model(config, model)
    layer = model.layer
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    if bound:
        bind(layer, "default")
    return layer


def trained(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of what trains."""
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y = layer(x)
    grads = torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    return [y, *grads]


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, ROWS, K, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "r": 3}], ids=str)
@pytest.mark.parametrize("kind", ["dense", "nf4", "nf4, double"])
def test_equals_pefts_forward(kind: str, settings: dict[str, object]) -> None:
    x = rows()
    layer = adapted(kind, **settings)
    assert "lora_linear" in layer(x).grad_fn.next_functions[0][0].name().lower() + str(layer(x).grad_fn).lower()
    for ours, theirs in zip(trained(layer, x), trained(adapted(kind, bound=False, **settings), x), strict=True):
        assert distance(ours, theirs) < 1e-5 * max(1.0, float(theirs.detach().abs().max()))


def test_dropout_in_training_alone() -> None:
    layer, x = adapted(dropout=0.3), rows()
    torch.manual_seed(5)
    first, second = layer(x), layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)
    assert torch.equal(layer.eval()(x), layer(x))
    with torch.no_grad():
        mean = torch.stack([layer.train()(x) for _ in range(400)]).mean(0)
        assert distance(mean, layer.eval()(x)) < 0.3


@pytest.mark.parametrize(("kind", "dropout", "share"), [("dense", 0.0, 1.0), ("dense", 0.1, 0.7), ("nf4", 0.1, 0.7)])
def test_keeps_less_than_peft(kind: str, dropout: float, share: float) -> None:
    x = rows()
    ours, pefts = (adapted(kind, dropout=dropout, bound=b) for b in (True, False))
    assert saved_bytes(lambda: ours(x)) <= share * saved_bytes(lambda: pefts(x))


def test_disabled_and_merged_layers_are_pefts() -> None:
    layer, x = adapted(), rows()
    live = layer(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    layer.merge()
    torch.testing.assert_close(layer(x), live)
    layer.unmerge()
    half = layer(x.bfloat16().float())
    layer.base_layer.bfloat16()
    assert layer(x.bfloat16()).dtype == torch.bfloat16 and half.dtype == torch.float32  # float32 adapters: peft casts


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("dense", {"use_dora": True}, "Dora is another formula"),
        ("int8", {}, "its layers are Linear8bitLt"),
        ("dense", {"lora_bias": True}, "lora_bias is set"),
    ],
    ids=["dora", "int8", "bias"],
)
def test_what_keeps_pefts_forward_says_why(
    kind: str,
    settings: dict[str, object],
    reason: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level(logging.INFO, logger="tinyllava_fast"):
        layer = adapted(kind, **settings)
    assert "forward" not in vars(layer)
    assert not caplog.messages or reason in caplog.messages[-1]  # said once a process
    x = rows()
    assert torch.equal(layer(x), adapted(kind, bound=False, **settings)(x))


def reached(output: Tensor) -> set[int]:
    """Addresses of the leaves that the backward pass would write a gradient for."""
    found, seen, open_nodes = set(), set(), [output.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        open_nodes += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_the_backward_pass_ends_at_the_lowest_adapter(kind: str) -> None:
    below, layer = nn.Linear(K, K).requires_grad_(False), adapted(kind)
    x = rows().detach()
    hidden = below(x)
    y = layer(hidden)
    assert not hidden.requires_grad
    assert reached(y) == {id(layer.lora_A["default"].weight), id(layer.lora_B["default"].weight)}
    y.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for m in (below, layer) for p in m.parameters())
