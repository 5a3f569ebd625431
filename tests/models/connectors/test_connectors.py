"""Every registered connector: shapes, gradients, initialisation, fullgraph compile, config round trip."""

from __future__ import annotations

import pytest
import torch

from tinyllava_fast.config.load import parse_into
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.connectors.base import CONNECTORS


@pytest.mark.parametrize("name", CONNECTORS.names())
def test_contract(name: str) -> None:
    connector = CONNECTORS.get(name)(12, 20)
    connector.reset(torch.Generator().manual_seed(0))
    features = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out = connector(features)
    assert out.shape == (2, connector.num_tokens(9), 20)
    out.square().sum().backward()
    assert features.grad is not None and all(p.grad is not None and p.grad.any() for p in connector.parameters())
    torch.testing.assert_close(torch.compile(connector, fullgraph=True, backend="aot_eager")(features), out)
    config = connector.to_config()
    again = CONNECTORS.get(config["type"])(12, 20, parse_into(type(connector).Options, config["options"], "x"))
    again.load_state_dict(connector.state_dict())
    torch.testing.assert_close(again(features), out)


def test_mlp_is_llavas(tmp_path: object) -> None:
    mlp = CONNECTORS.get("mlp")
    connector = mlp(64, 96, mlp.Options(depth=2, activation="gelu"))
    connector.reset(torch.Generator().manual_seed(0))
    assert list(connector.state_dict()) == ["layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"]
    weights = [p for p in connector.parameters() if p.ndim == 2]
    assert all(abs(w.std().item() - 0.02) < 1e-3 and abs(w.mean().item()) < 1e-3 for w in weights)
    assert not any(p.any() for p in connector.parameters() if p.ndim == 1)
    x = torch.randn(1, 3, 64)
    first, last = connector.layers[0], connector.layers[2]
    want = torch.nn.functional.gelu(x @ first.weight.T) @ last.weight.T  # type: ignore[operator]
    torch.testing.assert_close(connector(x), want)


@pytest.mark.parametrize(("activation", "kind"), [("relu", torch.nn.ReLU), ("silu", torch.nn.SiLU)])
def test_activations(activation: str, kind: type) -> None:
    mlp = CONNECTORS.get("mlp")
    connector = mlp(4, 4, mlp.Options(depth=3, activation=activation))
    assert [type(m) for m in connector.layers][1::2] == [kind, kind]


def test_errors() -> None:
    mlp = CONNECTORS.get("mlp")
    for options, message in (
        ({"dept": 2}, "unknown key; did you mean 'depth'"),
        ({"depth": 0}, "at least 1"),
        ({"activation": "tanh"}, "activation"),
    ):
        with pytest.raises(UserError, match=message):
            parse_into(mlp.Options, options, "model.connector.options")
    with pytest.raises(UserError, match="unknown connector 'mpl'; did you mean 'mlp'"):
        CONNECTORS.get("mpl")
