"""Vision towers as other projects store them: whole, with layers above the one that is read."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from tinyllava_fast.models.architecture import Values
from tinyllava_fast.models.hf import config_to_dict
from tinyllava_fast.models.vision._encoder import EncoderTower
from tinyllava_fast.models.vision.base import VisionTower
from tinyllava_fast.models.vision.dinov2 import BACKBONE_KEYS, Dinov2Tower, interpolate_by_factor

TOWERS = ("clip", "siglip", "siglip2", "dinov2")
_FINAL_NORM = re.compile(r"(post_)?layernorm\.weight")


def plain_encoder(vision: VisionTower) -> EncoderTower | None:
    """Return the tower if it is one that transformers 4 has, on images of one size."""
    if not isinstance(vision, EncoderTower) or vision.name not in TOWERS:
        return None
    return None if vision.config.model_type == "siglip2_vision_model" else vision


def completed(vision: EncoderTower, **changes: object) -> tuple[Values, dict[str, Tensor]]:
    """(transformers config, every weight of the transformers class) of a tower.

    Its last layer is ours, so one more follows and feature layer -2 is what we read. That layer's weights are zero:
    only its residual path is left, and it changes nothing. Nor does the rest that is filled in: norms of ones, heads
    of zeros. changes: config keys that the format has differently.
    """
    config = config_to_dict(vision.config) | {"num_hidden_layers": vision.num_layers + 1} | changes
    config = {k: v for k, v in config.items() if k not in BACKBONE_KEYS}
    model_class = vision.model_classes[vision.model_types().index(config["model_type"])]
    given = {k: v for k, v in config.items() if k != "model_type"}
    with torch.device("meta"):
        whole = model_class(type(vision.config)(**given))
    weights = dict(vision.state_dict())
    dtype = next(iter(weights.values())).dtype
    for name, like in whole.named_parameters():
        if name not in weights:
            fill = torch.ones if _FINAL_NORM.fullmatch(name) else torch.zeros
            weights[name] = fill(like.shape, dtype=dtype)
    return config, weights


def resized_positions(dinov2: Dinov2Tower) -> Tensor:
    """Return DINOv2's position table at the size of its input, resized as the tower does it."""
    module, grid = dinov2.embeddings, dinov2.image_size // dinov2.config.patch_size
    if dinov2.interpolation == "transformers4":
        return interpolate_by_factor(module.position_embeddings, grid).contiguous()
    tokens = module.position_embeddings.new_zeros(1, grid * grid + 1, dinov2.hidden_size)
    return module.interpolate_pos_encoding(tokens, dinov2.image_size, dinov2.image_size).contiguous()
