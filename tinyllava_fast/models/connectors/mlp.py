"""LLaVA's MLP: Linear, then (depth - 1) times activation and Linear; also under the field's names (mlp2x_gelu)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from tinyllava_fast.config.ranges import Layers
from tinyllava_fast.models.connectors.base import CONNECTORS, Connector, W
from tinyllava_fast.ops.connector_mlp import connector_mlp

_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class MLP(nn.Sequential):
    """Linear, then (depth - 1) times activation and Linear. Two plain layers run as one op that keeps less.

    Layers that a recipe has wrapped (LoRA) or replaced (quantized) are called one by one: their forward is not a
    product with ``weight``. activation: gelu, relu or silu.
    """

    def __init__(self, vision_size: int, llm_size: int, *, depth: Layers = 2, activation: str = "gelu") -> None:
        modules: list[nn.Module] = [nn.Linear(vision_size, llm_size)]
        for _ in range(depth - 1):
            modules += [_ACTIVATIONS[activation](), nn.Linear(llm_size, llm_size)]
        super().__init__(*modules)
        self._activation = activation

    def forward(self, features: Tensor) -> Tensor:
        """[..., V] -> [..., D]."""
        pair = self._plain_pair()
        if pair is None:
            return super().forward(features)
        first, last = pair
        return connector_mlp(features, first.weight, first.bias, last.weight, last.bias, self._activation)

    def external_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of other modules that ``forward`` reads: ZeRO-3 has to gather them for it."""
        return list(self.parameters()) if self._plain_pair() else []

    def _plain_pair(self) -> tuple[nn.Linear, nn.Linear] | None:
        """Return the two layers that run as one op, if they do."""
        if len(self) != 3:
            return None
        first, last = self[0], self[2]
        return (first, last) if type(first) is nn.Linear and type(last) is nn.Linear else None


@CONNECTORS.register("mlp")
class MLPConnector(Connector):
    """TinyLLaVA's mlp2x_gelu is {depth: 2, activation: gelu}; depth 1 is a single linear map."""

    name = "mlp"

    @dataclass(frozen=True, kw_only=True)
    class Options(Connector.Options):
        """Settings of the MLP."""

        depth: Layers = 2
        """Linear layers."""
        activation: Literal["gelu", "relu", "silu"] = "gelu"
        """Between the linear layers; gelu is the exact erf form."""

    options: Options

    def __init__(self, vision_size: int, llm_size: int, options: Connector.Options | None = None) -> None:
        super().__init__(vision_size, llm_size, options)
        self.layers = MLP(vision_size, llm_size, depth=self.options.depth, activation=self.options.activation)

    def forward(self, features: Tensor) -> Tensor:
        """[N, K, V] -> [N, K, D]."""
        return self.layers(features)

    @classmethod
    def from_reference_names(cls, state: Mapping[str, W]) -> dict[str, W]:
        """See the base class: the reference's Sequential has no name of its own."""
        return {f"layers.{name}": tensor for name, tensor in state.items()}


def _register_field_name(depth: int, activation: str) -> None:
    """``mlp{depth}x_{activation}`` builds the same MLP and is stored as ``mlp`` with its options."""

    class Named(MLPConnector):
        @dataclass(frozen=True, kw_only=True)
        class Options(Connector.Options):
            """None: the name says everything."""

        def __init__(self, vision_size: int, llm_size: int, options: Connector.Options | None = None) -> None:
            super().__init__(vision_size, llm_size, MLPConnector.Options(depth=depth, activation=activation))  # type: ignore[arg-type]

    CONNECTORS.register(f"mlp{depth}x_{activation}")(Named)


for _depth in (1, 2, 3, 4):
    for _activation in _ACTIVATIONS:
        _register_field_name(_depth, _activation)
