"""SigLIP's vision transformer: no CLS token, no norm before the encoder."""

from __future__ import annotations

from typing import ClassVar

from transformers import PreTrainedConfig, PreTrainedModel, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tinyllava_fast.models.vision._encoder import EncoderTower
from tinyllava_fast.models.vision.base import VISION


@VISION.register("siglip")
class SiglipTower(EncoderTower):
    """SigLIP. ``feature_select: patch`` drops its first *patch*, as TinyLLaVA Factory does for every tower."""

    name = "siglip"
    model_classes: ClassVar[tuple[type[PreTrainedModel], ...]] = (SiglipVisionModel,)
    processor_class = SiglipImageProcessorPil

    @classmethod
    def _truncate(cls, config: PreTrainedConfig, feature_layer: int, where: str) -> None:
        super()._truncate(config, feature_layer, where)
        config.vision_use_head = False

    @classmethod
    def image_processor(cls, image_size: int) -> SiglipImageProcessorPil:
        """Squash to image_size x image_size (bicubic), mean and std 0.5."""
        return SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
