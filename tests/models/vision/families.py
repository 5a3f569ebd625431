"""Tiny towers of every family, and transformers' whole models to hold them against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from tinyllava_fast.config.load import parse_into
from tinyllava_fast.models.vision._encoder import EncoderTower
from tinyllava_fast.models.vision.base import VISION, VisionTower

BASE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}
SIZES = BASE | {"intermediate_size": 40, "image_size": 32}
DINO = BASE | {"mlp_ratio": 2, "image_size": 32}


@dataclass(frozen=True)
class Family:
    """A tower's registered name, transformers' classes for it, a tiny config and the tokens before its patches."""

    tower: str
    model: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    values: dict[str, object]
    prefix: int = 0
    whole: tuple[type[PreTrainedModel], type[PreTrainedConfig]] | None = None
    """The image-text model that holds the tower, and its config."""

    def stock(self, seed: int = 0) -> PreTrainedModel:
        """transformers' own model with random weights, every one of them drawn (registers start at zero)."""
        torch.manual_seed(seed)
        model = self.model(self.config(**self.values)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("register_tokens", "position_embeddings")):
                torch.nn.init.normal_(parameter, std=0.3)
        return model


def derived(name: str) -> Family | None:
    """The family of an encoder that has no entry below, from what the tower says of itself."""
    kind = VISION.get(name)
    if name in {family.tower for family in FAMILIES.values()} or not issubclass(kind, EncoderTower):
        return None
    model = kind.model_classes[0]
    values = kind.tiny()["config"] | {"hidden_size": 24, "image_size": 32}
    return Family(name, model, model.config_class, values, prefix=kind.prefix_tokens(model.config_class(**values)))


FAMILIES = {
    "clip": Family(
        "clip", hf.CLIPVisionModel, hf.CLIPVisionConfig, SIZES, prefix=1, whole=(hf.CLIPModel, hf.CLIPConfig)
    ),
    "siglip": Family(
        "siglip", hf.SiglipVisionModel, hf.SiglipVisionConfig, SIZES, whole=(hf.SiglipModel, hf.SiglipConfig)
    ),
    "siglip2": Family(
        "siglip2", hf.SiglipVisionModel, hf.SiglipVisionConfig, SIZES, whole=(hf.SiglipModel, hf.SiglipConfig)
    ),
    "siglip2_naflex": Family(
        "siglip2",
        hf.Siglip2VisionModel,
        hf.Siglip2VisionConfig,
        BASE | {"intermediate_size": 40, "num_patches": 16},
        whole=(hf.Siglip2Model, hf.Siglip2Config),
    ),
    "dinov2": Family("dinov2", hf.Dinov2Model, hf.Dinov2Config, DINO, prefix=1),
    "dinov2_swiglu": Family("dinov2", hf.Dinov2Model, hf.Dinov2Config, DINO | {"use_swiglu_ffn": True}, prefix=1),
    "dinov2_with_registers": Family(
        "dinov2_with_registers",
        hf.Dinov2WithRegistersModel,
        hf.Dinov2WithRegistersConfig,
        DINO | {"num_register_tokens": 3},
        prefix=4,
    ),
}
FAMILIES |= {family.tower: family for family in map(derived, VISION) if family is not None}
# The mixture has no stock model: its halves do.
MOF = {"dinov2": {"config": DINO | {"image_size": 48}}}


def hidden_states(model: PreTrainedModel, pixels: Tensor, layer: int) -> Tensor:
    """hidden_states[layer] of a whole transformers tower."""
    if isinstance(model, hf.Siglip2VisionModel):
        patch = model.config.patch_size
        rows = torch.stack([torch.from_numpy(convert_image_to_patches(image.numpy(), patch)) for image in pixels])
        grid = torch.tensor([[pixels.shape[2] // patch, pixels.shape[3] // patch]] * len(pixels))
        mask = torch.ones(rows.shape[:2], dtype=torch.int64)
        return model(rows, mask, grid, output_hidden_states=True).hidden_states[layer]
    return model(pixels, output_hidden_states=True).hidden_states[layer]


def random_tower(
    family: str,
    layer: int = -2,
    select: str | None = "cls_patch",
    seed: int = 0,
    options: Mapping[str, object] | None = None,
    **config: object,
) -> VisionTower:
    """A tower with random weights; keyword arguments change its transformers config. "mof" is a family too."""
    if family == "mof":
        name, values, given = "mof", SIZES, MOF
    else:
        name, values, given = FAMILIES[family].tower, FAMILIES[family].values, {}
        values = values | {"model_type": FAMILIES[family].config.model_type}
    kind = VISION.get(name)
    return kind.from_config(
        values | config,
        feature_layer=layer,
        feature_select=select,
        options=parse_into(kind.Options, options if options is not None else given, "model.vision.options"),
        seed=seed,
        where="model.vision",
    )


def open_tower(
    name: str,
    path: Path | str,
    layer: int = -2,
    select: str | None = "cls_patch",
    options: Mapping[str, object] | None = None,
    **overrides: object,
) -> VisionTower:
    """A tower of a registered name with the weights of a folder."""
    kind = VISION.get(name)
    return kind.from_config(
        overrides,
        path=str(path),
        feature_layer=layer,
        feature_select=select,
        options=parse_into(kind.Options, options or {}, "model.vision.options"),
        where="model.vision",
    )


def images(count: int = 2, side: int = 32) -> Tensor:
    """Seeded pixels [count, 3, side, side]."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))
