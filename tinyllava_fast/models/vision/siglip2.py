"""SigLIP 2 (arXiv:2502.14786): fixed-resolution checkpoints are SigLIP towers, NaFlex ones a class of their own."""

from __future__ import annotations

import math

from torch import Tensor
from transformers import PreTrainedConfig, Siglip2VisionModel, SiglipVisionModel
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

from tinyllava_fast.errors import UserError
from tinyllava_fast.models.architecture import Values
from tinyllava_fast.models.vision.base import VISION, VisionTower
from tinyllava_fast.models.vision.siglip import SiglipTower


@VISION.register("siglip2")
class Siglip2Tower(SiglipTower):
    """Either kind, by the config's ``model_type``.

    NaFlex (``siglip2_vision_model``) runs on square images of its native grid, sqrt(num_patches) patches a side: then
    shapes are static, no token is padding, and its position table applies without interpolation.
    """

    name = "siglip2"
    model_classes = (SiglipVisionModel, Siglip2VisionModel)

    @classmethod
    def tiny(cls) -> dict[str, Values]:
        """See the base class; one for NaFlex."""
        config = {k: v for k, v in super().tiny()["config"].items() if k != "image_size"}
        return {"config": config | {"model_type": "siglip2_vision_model", "num_patches": 4}}

    @classmethod
    def input_side(cls, config: PreTrainedConfig, options: VisionTower.Options) -> int:
        """NaFlex configs state a number of patches instead of a size."""
        if config.model_type == "siglip_vision_model":
            return int(config.image_size)
        return math.isqrt(config.num_patches) * int(config.patch_size)

    @classmethod
    def _check(cls, config: PreTrainedConfig, options: VisionTower.Options | None, where: str) -> None:
        patches = getattr(config, "num_patches", 1)
        if math.isqrt(patches) ** 2 != patches:
            raise UserError(f"{where}.config: num_patches {patches} is not a square; NaFlex runs on its native grid")
        super()._check(config, options, where)

    def embed(self, pixels: Tensor) -> Tensor:
        """See the base class."""
        if not isinstance(self.embeddings, Siglip2VisionEmbeddings):
            return super().embed(pixels)
        images, channels, _, _ = pixels.shape
        patch = self.config.patch_size
        grid = self.image_size // patch
        rows = pixels.reshape(images, channels, grid, patch, grid, patch)
        rows = rows.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [N, patches, patch * patch * channels]
        weight = self.embeddings.position_embedding.weight  # [patches, V]
        return self.embeddings.patch_embedding(rows.to(weight.dtype)) + weight
