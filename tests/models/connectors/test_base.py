"""Every registered connector: shapes, gradients, initialization, fullgraph compile, config round trip, error texts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tinyllava_fast.config.load import parse_into
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.architecture import ConnectorPart
from tinyllava_fast.models.connectors.base import CONNECTORS, Connector

SMALL: dict[str, dict[str, object]] = {
    "qformer": {"num_queries": 5, "hidden_size": 16, "num_layers": 3, "num_heads": 2, "intermediate_size": 24},
    "resampler": {"num_queries": 5, "num_layers": 2, "num_heads": 2, "head_size": 4, "expansion": 2},
}
WIDTH, GRID = 12, 16  # V and K


def build(name: str, vision_size: int = WIDTH, llm_size: int = 20, **options: object) -> Connector:
    kind = CONNECTORS.get(name)
    connector = kind(vision_size, llm_size, parse_into(kind.Options, options, "model.connector.options"))
    connector.reset(torch.Generator().manual_seed(0))
    return connector


def small(name: str) -> Connector:
    return build(name, WIDTH, WIDTH if name == "identity" else 20, **SMALL.get(name, {}))


def features(images: int = 2) -> torch.Tensor:
    return torch.randn(images, GRID, WIDTH, generator=torch.Generator().manual_seed(1))


def test_all_are_here() -> None:
    named = {f"mlp{n}x_{a}" for n in (1, 2, 3, 4) for a in ("gelu", "relu", "silu")}
    others = {"identity", "linear", "mlp", "mof", "mof_mlp", "pixel_shuffle", "qformer", "resampler"}
    assert named | others <= set(CONNECTORS)


@pytest.mark.parametrize("name", CONNECTORS.names())
def test_contract(name: str) -> None:
    connector = small(name).eval()
    rows = features().requires_grad_()
    out = connector(rows)
    assert out.shape == (2, connector.num_tokens(GRID), connector.llm_size)
    out.square().sum().backward()
    assert rows.grad is not None and all(p.grad is not None and p.grad.any() for p in connector.parameters())
    torch.testing.assert_close(connector(rows[:1]), out[:1])  # images do not see one another
    config = connector.describe()
    kind = CONNECTORS.get(config.type)
    again = kind(connector.vision_size, connector.llm_size, parse_into(kind.Options, config.options, "x")).eval()
    assert again.describe() == config, "what is stored is canonical"
    again.load_state_dict(connector.state_dict())
    assert torch.equal(again(rows), out)


@pytest.mark.parametrize("name", [n for n in CONNECTORS if n == "mlp" or not n.startswith("mlp")])
def test_compiles_fullgraph_forward_and_backward(name: str) -> None:
    plain, compiled = small(name).eval(), small(name).eval()
    want = plain(features())
    if name != "identity":
        want.square().sum().backward()
    torch.compiler.reset()
    got = torch.compile(compiled, fullgraph=True, backend="aot_eager")(features())
    torch.testing.assert_close(got, want)
    if name != "identity":
        got.square().sum().backward()
    for mine, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("name", CONNECTORS.names())
def test_no_image_gives_no_rows_and_zero_gradients(name: str) -> None:
    """A step without images must leave the optimizer in the same state whatever the connector."""
    connector = small(name)
    out = connector(torch.zeros(0, GRID, WIDTH))
    assert out.shape == (0, connector.num_tokens(GRID), connector.llm_size)
    if name != "identity":
        out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in connector.parameters())


@pytest.mark.parametrize("name", CONNECTORS.names())
def test_initialization(name: str) -> None:
    """N(0, 0.02) linears, zero biases, norms at one and zero; all of it from the generator."""
    first, again = small(name), small(name)
    for (key, mine), other in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, other)
        owner = first.get_submodule(key.rpartition(".")[0])
        if isinstance(owner, torch.nn.LayerNorm):
            assert (mine == float(key.endswith("weight"))).all()
        elif key.endswith("bias"):
            assert not mine.any()
        else:
            scale = 1.0 if key == "latents" else 0.02
            assert 0.6 * scale < mine.std() < 1.4 * scale, key
            assert abs(mine.mean()) < 0.4 * scale, key


@pytest.mark.parametrize("name", ["qformer"])
def test_dropout_only_in_training(name: str) -> None:
    connector = small(name)
    assert not torch.equal(connector(features()), connector(features()))
    connector.eval()
    assert torch.equal(connector(features()), connector(features()))


def test_mlp_is_llavas() -> None:
    connector = build("mlp", 64, 96, depth=2, activation="gelu")
    assert list(connector.state_dict()) == ["layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"]
    x = torch.randn(1, 3, 64)
    first, last = connector.layers[0], connector.layers[2]  # type: ignore[index]
    torch.testing.assert_close(connector(x), torch.nn.functional.gelu(x @ first.weight.T) @ last.weight.T)


@pytest.mark.parametrize(("activation", "kind"), [("relu", torch.nn.ReLU), ("silu", torch.nn.SiLU)])
def test_activations(activation: str, kind: type) -> None:
    connector = build("mlp", 4, 4, depth=3, activation=activation)
    assert [type(m) for m in connector.layers][1::2] == [kind, kind]  # type: ignore[union-attr]


def test_the_fields_names_are_stored_as_mlp() -> None:
    connector = build("mlp3x_silu")
    assert connector.describe() == ConnectorPart(type="mlp", options={"depth": 3, "activation": "silu"})
    same = build("mlp", depth=3, activation="silu")
    assert torch.equal(connector(features()), same(features()))


def test_pixel_shuffle_takes_blocks_row_by_row() -> None:
    connector = build("pixel_shuffle", 1, 4, factor=2)
    connector.linear.weight.data = torch.eye(4)  # type: ignore[union-attr]
    grid = torch.arange(16.0).view(1, 16, 1)
    assert connector(grid).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]
    assert build("pixel_shuffle", factor=3).num_tokens(729) == 81


def test_mof_interleaves() -> None:
    connector = build("mof_mlp")
    x = features()
    out = connector(x)
    assert torch.equal(out[:, 0::2], connector.clip(x[..., :6])) and torch.equal(
        out[:, 1::2], connector.dinov2(x[..., 6:])
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build("mlp", dept=2), "unknown key; did you mean 'depth'"),
        (lambda: build("mlp", depth=0), "from 1 to 4096"),
        (lambda: build("mlp", activation="tanh"), "activation"),
        (lambda: build("mlp2x_gelu", depth=3), "unknown key"),
        (lambda: build("mpl"), "unknown connector 'mpl'; did you mean 'mlp'"),
        (lambda: build("mlp5x_gelu"), "unknown connector 'mlp5x_gelu'; did you mean 'mlp"),
        (lambda: build("identity", 12, 20), "they have 12 and 20 channels; use linear or mlp"),
        (lambda: build("qformer", num_queries=0), "num_queries: expected a whole number from 1 to .*, got 0"),
        (lambda: build("qformer", hidden_size=10, num_heads=3), "hidden_size: 10 is not a multiple of num_heads 3"),
        (lambda: build("resampler", num_layers=0), "num_layers: expected a whole number from 1 to .*, got 0"),
        (lambda: build("pixel_shuffle", factor=0), "factor: expected a whole number from 1 to .*, got 0"),
        (lambda: build("pixel_shuffle").num_tokens(728), "728 are one short of 729: .*feature_select: cls_patch"),
        (lambda: build("pixel_shuffle").num_tokens(577), "577 are 1 more than 576: .*feature_select: patch"),
        (
            lambda: build("pixel_shuffle").num_tokens(729),
            "blocks of 2 x 2 do not tile .* 27 x 27 .*factor of 1, 3, 9, 27",
        ),
        (lambda: build("mof").check_widths((24, 32)), "CLIP has 24 channels and DINOv2 32"),
        (lambda: build("mof_mlp").check_widths((24,)), "use model.vision.type: mof"),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
