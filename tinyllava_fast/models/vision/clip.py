"""CLIP's vision transformer: a CLS token in front, a norm before the encoder."""

from __future__ import annotations

from transformers import CLIPVisionModel, PreTrainedConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tinyllava_fast.models.vision._encoder import EncoderTower
from tinyllava_fast.models.vision.base import VISION


@VISION.register("clip")
class CLIPTower(EncoderTower):
    """CLIP. ``feature_select: patch`` drops the CLS token."""

    name = "clip"
    model_classes = (CLIPVisionModel,)
    processor_class = CLIPImageProcessorPil
    children_kept = ("embeddings", "pre_layrnorm", "encoder")

    @classmethod
    def prefix_tokens(cls, config: PreTrainedConfig) -> int:
        """Return 1, for the CLS token."""
        return 1

    @classmethod
    def image_processor(cls, image_size: int) -> CLIPImageProcessorPil:
        """Shortest edge to image_size (bicubic), centre crop, CLIP's mean and std."""
        return CLIPImageProcessorPil(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
        )
