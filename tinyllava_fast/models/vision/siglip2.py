"""SigLIP 2 (arXiv:2502.14786): fixed-resolution checkpoints are SigLIP towers, NaFlex ones a class of their own."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from transformers import Siglip2VisionModel, SiglipVisionModel

from tinyllava_fast.errors import UserError
from tinyllava_fast.models.vision.base import VISION
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
    def tiny(cls) -> dict[str, Any]:
        """See the base class; one for NaFlex."""
        config = {k: v for k, v in super().tiny()["config"].items() if k != "image_size"}
        return {"config": config | {"model_type": "siglip2_vision_model", "num_patches": 4}}

    @classmethod
    def input_side(cls, config: Any, options: Any) -> int:
        """NaFlex configs state a number of patches instead of a size."""
        if config.model_type == "siglip_vision_model":
            return int(config.image_size)
        return math.isqrt(config.num_patches) * int(config.patch_size)

    @classmethod
    def _check(cls, config: Any, options: Any, where: str) -> None:
        patches = getattr(config, "num_patches", 1)
        if math.isqrt(patches) ** 2 != patches:
            raise UserError(f"{where}.config: num_patches {patches} is not a square; NaFlex runs on its native grid")
        super()._check(config, options, where)

    def embed(self, pixels: Tensor) -> Tensor:
        """See the base class."""
        if self.config.model_type == "siglip_vision_model":
            return super().embed(pixels)
        images, channels, _, _ = pixels.shape
        patch = self.config.patch_size
        grid = self.image_size // patch
        rows = pixels.reshape(images, channels, grid, patch, grid, patch)
        rows = rows.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [N, patches, patch * patch * channels]
        module: Any = self.embeddings
        weight = module.position_embedding.weight  # [patches, V]
        return module.patch_embedding(rows.to(weight.dtype)) + weight
