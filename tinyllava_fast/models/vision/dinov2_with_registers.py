"""DINOv2 with registers (arXiv:2309.16588): four more tokens between CLS and the patches."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import Dinov2WithRegistersModel, PreTrainedConfig, PreTrainedModel

from tinyllava_fast.models.architecture import Values
from tinyllava_fast.models.vision.base import VISION, VisionTower
from tinyllava_fast.models.vision.dinov2 import Dinov2Tower, SizeOptions


@VISION.register("dinov2_with_registers")
class Dinov2WithRegistersTower(Dinov2Tower):
    """DINOv2 with registers. ``feature_select: patch`` drops the CLS token and the registers."""

    name = "dinov2_with_registers"
    model_classes = (Dinov2WithRegistersModel,)

    @classmethod
    def tiny(cls) -> dict[str, Values]:
        """See the base class."""
        return {"config": super().tiny()["config"] | {"image_size": 16}}

    @dataclass(frozen=True, kw_only=True)
    class Options(SizeOptions):
        """Settings of DINOv2 towers with registers, which TinyLLaVA Factory lacks: their tables are resized one way."""

    def __init__(
        self,
        model: PreTrainedModel,
        feature_select: str | None,
        options: VisionTower.Options | None = None,
        where: str = "",
    ) -> None:
        super().__init__(model, feature_select, options, where)
        # The token of masked-image training; the config cannot leave it out.
        self.embeddings.register_parameter("mask_token", None)

    @classmethod
    def prefix_tokens(cls, config: PreTrainedConfig) -> int:
        """Return 1 for the CLS token and the number of registers."""
        return 1 + int(config.num_register_tokens)
