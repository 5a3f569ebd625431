"""DINOv2 with registers (arXiv:2309.16588): four more tokens between CLS and the patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Dinov2WithRegistersModel, PreTrainedModel

from tinyllava_fast.config.ranges import Pixels
from tinyllava_fast.models.vision._encoder import EncoderTower
from tinyllava_fast.models.vision.base import VISION
from tinyllava_fast.models.vision.dinov2 import Dinov2Tower


@VISION.register("dinov2_with_registers")
class Dinov2WithRegistersTower(Dinov2Tower):
    """DINOv2 with registers. ``feature_select: patch`` drops the CLS token and the registers."""

    name = "dinov2_with_registers"
    model_classes = (Dinov2WithRegistersModel,)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """See the base class."""
        return {"config": super().tiny()["config"] | {"image_size": 16}}

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Settings of DINOv2 towers with registers."""

        image_size: Pixels | None = None
        """Side of the input images in pixels; None: the size of the position table (518 in the released models,
        whose own image processor makes 224)."""

    def __init__(
        self, model: PreTrainedModel, feature_select: str | None, options: Any = None, where: str = ""
    ) -> None:
        super().__init__(model, feature_select, options, where)
        embeddings: Any = self.embeddings
        embeddings.mask_token = None  # of masked-image training; the config cannot leave it out

    def embed(self, pixels: Tensor) -> Tensor:
        """See the base class; there is no other numerics, since TinyLLaVA Factory lacks this tower."""
        return EncoderTower.embed(self, pixels)

    @classmethod
    def prefix_tokens(cls, config: Any) -> int:
        """CLS and the registers."""
        return 1 + int(config.num_register_tokens)
