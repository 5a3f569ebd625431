"""Tower features as they are: for a tower as wide as the language model."""

from __future__ import annotations

from torch import Tensor

from tinyllava_fast.errors import UserError
from tinyllava_fast.models.connectors.base import CONNECTORS, Connector


@CONNECTORS.register("identity")
class IdentityConnector(Connector):
    """No parameters; UserError unless V == D."""

    name = "identity"

    def __init__(self, vision_size: int, llm_size: int, options: Connector.Options | None = None) -> None:
        super().__init__(vision_size, llm_size, options)
        if vision_size != llm_size:
            raise UserError(
                f"model.connector: identity needs a tower as wide as the language model, but they have {vision_size} "
                f"and {llm_size} channels; use linear or mlp"
            )

    def forward(self, features: Tensor) -> Tensor:
        """[N, K, D] -> the same."""
        return features
