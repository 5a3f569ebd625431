"""The connector of a mixture of features: an MLP for each tower, their tokens interleaved (arXiv:2401.06209)."""

from __future__ import annotations

import torch
from torch import Tensor

from tinyllava_fast.errors import UserError
from tinyllava_fast.models.connectors.base import CONNECTORS, Connector
from tinyllava_fast.models.connectors.mlp import MLP


@CONNECTORS.register("mof")
@CONNECTORS.register("mof_mlp")
class MoFConnector(Connector):
    """For the ``mof`` tower: a token of CLIP (at an even position), then DINOv2's of the same patch."""

    name = "mof_mlp"

    def __init__(self, vision_size: int, llm_size: int, options: Connector.Options | None = None) -> None:
        super().__init__(vision_size, llm_size, options)
        self.clip = MLP(vision_size // 2, llm_size)
        self.dinov2 = MLP(vision_size // 2, llm_size)

    def check_widths(self, widths: tuple[int, ...]) -> None:
        """See the base class."""
        if len(widths) != 2:
            raise UserError("model.connector: mof_mlp joins the features of two towers; use model.vision.type: mof")
        if widths[0] != widths[1]:
            raise UserError(
                f"model.connector: mof_mlp needs two towers of one width, but CLIP has {widths[0]} channels and DINOv2 "
                f"{widths[1]}; choose other towers, or a connector that takes both together, such as mlp"
            )

    def num_tokens(self, num_features: int) -> int:
        """Return twice K: every token of every tower becomes a row."""
        return 2 * num_features

    def forward(self, features: Tensor) -> Tensor:
        """[N, K, 2 W] -> [N, 2 K, D]."""
        clip, dinov2 = features.chunk(2, dim=-1)
        return torch.stack([self.clip(clip), self.dinov2(dinov2)], dim=2).flatten(1, 2)

    def reads(self, features: Tensor) -> Tensor:
        """See the base class: the two rows of a patch are that patch."""
        images, tokens, _ = features.shape
        one = torch.eye(tokens, dtype=features.dtype, device=features.device).repeat_interleave(2, 0)
        return one.expand(images, -1, -1)
