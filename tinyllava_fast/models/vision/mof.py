"""Mixture of features (arXiv:2401.06209): CLIP and DINOv2 look at the same pixels, token by token.

Legend: N images, K tokens an image after selection, V tower width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor

from tinyllava_fast.config.ranges import Settings, Text
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.architecture import Values, VisionPart
from tinyllava_fast.models.vision.base import VISION, VisionTower, W
from tinyllava_fast.models.vision.clip import CLIPTower
from tinyllava_fast.models.vision.dinov2 import Dinov2Tower, Interpolation


@dataclass(frozen=True, kw_only=True)
class Dinov2Half:
    """The second tower of a mixture of features."""

    path: Text | None = None
    """Folder (or hub id) with pretrained weights; None: random weights from ``config``."""
    config: Settings = field(default_factory=dict)
    """transformers Dinov2Config of a tower with random weights. With ``path``: overrides."""
    interpolation: Interpolation = "transformers5"
    """Rule by which the position table is resized to CLIP's grid; see the option of the dinov2 tower."""


@VISION.register("mof")
class MoFTower(VisionTower):
    """CLIP and DINOv2 features [N, K, V1 + V2], CLIP's channels first.

    ``path`` and ``config`` are CLIP's, ``options.dinov2`` describes the other half, which interpolates its position
    table to CLIP's image size. Both see pixels normalized for CLIP. Both end at the same feature_layer and drop their
    CLS tokens alike.
    """

    name = "mof"
    processor_class = CLIPTower.processor_class

    @classmethod
    def tiny(cls) -> dict[str, Values]:
        """See the base class; each half is 16 wide."""
        other = Dinov2Tower.tiny()
        half = {"config": other["config"] | {"hidden_size": 16}, "interpolation": other["options"]["interpolation"]}
        config = super().tiny()["config"] | {"hidden_size": 16, "intermediate_size": 24}
        return {"config": config, "options": {"dinov2": half}}

    @dataclass(frozen=True, kw_only=True)
    class Options(VisionTower.Options):
        """Settings of a mixture of features."""

        dinov2: Dinov2Half = field(default_factory=Dinov2Half)
        """The DINOv2 half."""

    def __init__(self, clip: CLIPTower, dinov2: Dinov2Tower, where: str = "") -> None:
        super().__init__()
        if clip.num_tokens != dinov2.num_tokens:
            raise UserError(
                f"{where}: CLIP gives {clip.num_tokens} tokens an image and DINOv2 {dinov2.num_tokens}; a mixture of "
                f"features needs equally many: give both the same patch_size (they have {clip.config.patch_size} and "
                f"{dinov2.config.patch_size})"
            )
        self.clip = clip
        self.dinov2 = dinov2
        self.hidden_size = clip.hidden_size + dinov2.hidden_size
        self.num_tokens = clip.num_tokens
        self.image_size = clip.image_size
        self.num_layers = min(clip.num_layers, dinov2.num_layers)
        self.feature_select = clip.feature_select

    @classmethod
    def from_config(
        cls,
        config: Values,
        *,
        path: str | None = None,
        feature_layer: int,
        feature_select: str | None,
        options: VisionTower.Options | None = None,
        seed: int | None = None,
        dtype: torch.dtype = torch.float32,
        where: str,
        strict: bool = True,
    ) -> MoFTower:
        """See the base class."""
        half = options.dinov2 if isinstance(options, cls.Options) else Dinov2Half()
        if path is None and half.path is not None:
            raise UserError(f"{where}.options.dinov2.path: given without {where}.path; give both or neither")
        if path is not None and half.path is None:
            raise UserError(f"{where}.options.dinov2.path: missing; {where}.path is CLIP's, give DINOv2's too")
        common: Values = {"feature_layer": feature_layer, "feature_select": feature_select}
        common |= {"dtype": dtype, "strict": strict}
        clip = CLIPTower.from_config(config, path=path, seed=seed, where=where, **common)
        dinov2 = Dinov2Tower.from_config(
            half.config,
            path=half.path,
            options=Dinov2Tower.Options(image_size=clip.image_size, interpolation=half.interpolation),
            seed=None if seed is None else seed + 1_000_003,  # the halves must not draw the same numbers
            where=f"{where}.options.dinov2",
            **common,
        )
        return cls(clip, dinov2, where).train()

    @classmethod
    def input_size(cls, path: str | None, config: Values, options: VisionTower.Options, where: str) -> int:
        """See the base class; it is CLIP's."""
        return CLIPTower.input_size(path, config, CLIPTower.Options(), where)

    @classmethod
    def image_processor(cls, image_size: int) -> BaseImageProcessor:
        """See the base class; it is CLIP's."""
        return CLIPTower.image_processor(image_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """See the base class."""
        return torch.cat([self.clip(pixels), self.dinov2(pixels)], dim=-1)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of CLIP and of DINOv2."""
        return self.clip.hidden_size, self.dinov2.hidden_size

    @property
    def patch_numbers(self) -> list[int]:
        """See the base class; they are CLIP's."""
        return self.clip.patch_numbers

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of both halves."""
        return [*self.clip.layers, *self.dinov2.layers]

    def layer_parameters(self, from_layer: int) -> list[nn.Parameter]:
        """Return the parameters of both halves."""
        return [*self.clip.layer_parameters(from_layer), *self.dinov2.layer_parameters(from_layer)]

    def describe(self) -> VisionPart:
        """See the base class."""
        half = Dinov2Half(config=self.dinov2.describe().config, interpolation=self.dinov2.interpolation)
        return replace(self.clip.describe(), type=self.name, options=asdict(self.Options(dinov2=half)))

    @classmethod
    def from_reference_names(cls, state: Mapping[str, W]) -> dict[str, W]:
        """See the base class; the halves' prefixes are the same."""
        renamed: dict[str, W] = {}
        for prefix, half in (("clip.", CLIPTower), ("dinov2.", Dinov2Tower)):
            part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            renamed |= {prefix + k: v for k, v in half.from_reference_names(part).items()}
        return renamed
