"""The first LLaVA's connector: one linear map."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tinyllava_fast.models.connectors.base import CONNECTORS, Connector, W


@CONNECTORS.register("linear")
class LinearConnector(Connector):
    """Linear(V, D) with bias (arXiv:2304.08485)."""

    name = "linear"

    def __init__(self, vision_size: int, llm_size: int, options: Connector.Options | None = None) -> None:
        super().__init__(vision_size, llm_size, options)
        self.linear = nn.Linear(vision_size, llm_size)

    def forward(self, features: Tensor) -> Tensor:
        """[N, K, V] -> [N, K, D]."""
        return self.linear(features)

    @classmethod
    def from_reference_names(cls, state: Mapping[str, W]) -> dict[str, W]:
        """See the base class: the reference's linear map is the connector itself."""
        return {f"linear.{name}": tensor for name, tensor in state.items()}
