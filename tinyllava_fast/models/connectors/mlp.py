"""LLaVA's MLP: Linear, then (depth - 1) times activation and Linear."""

from __future__ import annotations

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
