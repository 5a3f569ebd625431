"""DINOv2 (arXiv:2304.07193): a CLS token, a position table that is interpolated to the size of the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import Dinov2Model, PreTrainedConfig, PreTrainedModel
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings, Dinov2Encoder

from tinyllava_fast.config.ranges import Pixels
from tinyllava_fast.models.architecture import Values, VisionPart
from tinyllava_fast.models.vision._encoder import EncoderTower
from tinyllava_fast.models.vision.base import VISION, VisionTower, W

Interpolation = Literal["transformers5", "transformers4"]
RENAMED = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
    ".mlp.weights_out.": ".mlp.down_proj.",
}
# What transformers derives for backbones from the number of layers, which truncation changes.
BACKBONE_KEYS = {"stage_names", "out_features", "out_indices"}


@dataclass(frozen=True, kw_only=True)
class SizeOptions(VisionTower.Options):
    """Settings of every DINOv2 tower."""

    image_size: Pixels | None = None
    """Side of the input images in pixels; None: the size of the position table (518 in the released models,
    whose own image processor makes 224)."""


@VISION.register("dinov2")
class Dinov2Tower(EncoderTower):
    """DINOv2. ``feature_select: patch`` drops the CLS token."""

    name = "dinov2"
    model_classes: ClassVar[tuple[type[PreTrainedModel], ...]] = (Dinov2Model,)
    processor_class = BitImageProcessorPil
    embeddings: Dinov2Embeddings
    encoder: Dinov2Encoder

    @classmethod
    def tiny(cls) -> dict[str, Values]:
        """See the base class; its position table is of larger images."""
        config = {k: v for k, v in super().tiny()["config"].items() if k != "intermediate_size"}
        options = {"image_size": 16, "interpolation": "transformers4"}
        return {"config": config | {"image_size": 32}, "options": options}

    @dataclass(frozen=True, kw_only=True)
    class Options(SizeOptions):
        """Settings of DINOv2 towers."""

        interpolation: Interpolation = "transformers5"
        """Rule by which the position table is resized (bicubic): to the grid's size, or by the scale factor of
        transformers 4, (grid + 0.1) / table, which gives other values; it trained TinyLLaVA Factory's models."""

    @classmethod
    def prefix_tokens(cls, config: PreTrainedConfig) -> int:
        """Return 1, for the CLS token."""
        return 1

    @classmethod
    def input_side(cls, config: PreTrainedConfig, options: VisionTower.Options) -> int:
        """Return the option, else the size that the position table is made for."""
        return int((isinstance(options, SizeOptions) and options.image_size) or config.image_size)

    @classmethod
    def _truncate(cls, config: PreTrainedConfig, feature_layer: int, where: str) -> None:
        super()._truncate(config, feature_layer, where)
        config.use_mask_token = False  # of masked-image training; nothing here reads it

    @property
    def layers(self) -> nn.ModuleList:
        """The encoder's layers that are built."""
        return self.encoder.layer

    @property
    def interpolation(self) -> Interpolation:
        """The rule by which the position table is resized."""
        return self.options.interpolation if isinstance(self.options, Dinov2Tower.Options) else "transformers5"

    def embed(self, pixels: Tensor) -> Tensor:
        """See the base class."""
        if self.interpolation == "transformers5":
            return super().embed(pixels)
        module = self.embeddings
        patches = module.patch_embeddings(pixels)
        hidden = torch.cat([module.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        positions = interpolate_by_factor(module.position_embeddings, self.image_size // self.config.patch_size)
        return module.dropout(hidden + positions)

    def describe(self) -> VisionPart:
        """See the base class."""
        part = super().describe()
        return replace(part, config={k: v for k, v in part.config.items() if k not in BACKBONE_KEYS})

    @classmethod
    def image_processor(cls, image_size: int) -> BitImageProcessorPil:
        """Shortest edge to 8/7 of image_size (bicubic), centre crop, ImageNet's mean and std: 256 -> 224."""
        return BitImageProcessorPil(
            size={"shortest_edge": round(image_size * 256 / 224)},
            crop_size={"height": image_size, "width": image_size},
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        )

    @classmethod
    def from_reference_names(cls, state: Mapping[str, W]) -> dict[str, W]:
        """See the base class; transformers 4 named the attention otherwise and fused the gate of SwiGLU layers."""
        renamed: dict[str, W] = {}
        for name, tensor in super().from_reference_names(state).items():
            for old, new in RENAMED.items():
                name = name.replace(old, new)
            if ".mlp.weights_in." in name:
                gate, up = tensor.chunk(2)
                renamed[name.replace("weights_in", "gate_proj")] = gate
                renamed[name.replace("weights_in", "up_proj")] = up
            elif name != "embeddings.mask_token":
                renamed[name] = tensor
        return renamed


def interpolate_by_factor(table: Tensor, grid: int) -> Tensor:
    """Position table [1, 1 + s * s, V] to [1, 1 + grid * grid, V] as transformers 4.40 did.

    The scale factor (grid + 0.1) / s itself enters the sampling coordinates, so values differ from resizing to grid x
    grid: by up to 0.77 on features of standard deviation 3.1, with random tables.
    """
    side = int((table.shape[1] - 1) ** 0.5)
    if grid == side:
        return table
    square = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, V, s, s]
    factor = (grid + 0.1) / side
    resized = nn.functional.interpolate(
        square.float(), scale_factor=(factor, factor), mode="bicubic", align_corners=False
    )
    return torch.cat([table[:, :1], resized.to(table.dtype).flatten(2).transpose(1, 2)], dim=1)
