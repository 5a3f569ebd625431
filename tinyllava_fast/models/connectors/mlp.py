"""LLaVA's MLP: Linear, then (depth - 1) times activation and Linear; also under the field's names (mlp2x_gelu)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from tinyllava_fast.errors import UserError
from tinyllava_fast.models.connectors.base import CONNECTORS, Connector

_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


@CONNECTORS.register("mlp")
class MLPConnector(Connector):
    """TinyLLaVA's mlp2x_gelu is {depth: 2, activation: gelu}; depth 1 is a single linear map."""

    name = "mlp"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Settings of the MLP."""

        depth: int = 2
        """Linear layers."""
        activation: Literal["gelu", "relu", "silu"] = "gelu"
        """Between the linear layers; gelu is the exact erf form."""

        def __post_init__(self) -> None:
            if self.depth < 1:
                raise UserError(f"depth: {self.depth} linear layers; at least 1")

    def __init__(self, vision_size: int, llm_size: int, options: Any = None) -> None:
        super().__init__(vision_size, llm_size, options)
        modules: list[nn.Module] = [nn.Linear(vision_size, llm_size)]
        for _ in range(self.options.depth - 1):
            modules += [_ACTIVATIONS[self.options.activation](), nn.Linear(llm_size, llm_size)]
        self.layers = nn.Sequential(*modules)

    def forward(self, features: Tensor) -> Tensor:
        """[N, K, V] -> [N, K, D]."""
        return self.layers(features)

    @classmethod
    def from_reference_names(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the base class: the reference's Sequential has no name of its own."""
        return {f"layers.{name}": tensor for name, tensor in state.items()}


def _register_field_name(depth: int, activation: str) -> None:
    """``mlp{depth}x_{activation}`` builds the same MLP and is stored as ``mlp`` with its options."""

    class Named(MLPConnector):
        Options: Any = Connector.Options  # the name says everything

        def __init__(self, vision_size: int, llm_size: int, options: Any = None) -> None:
            super().__init__(vision_size, llm_size, MLPConnector.Options(depth=depth, activation=activation))  # type: ignore[arg-type]

    CONNECTORS.register(f"mlp{depth}x_{activation}")(Named)


for _depth in (1, 2, 3, 4):
    for _activation in _ACTIVATIONS:
        _register_field_name(_depth, _activation)
