"""Pixel shuffle: fewer, wider tokens. Each block of factor x factor patches becomes one (as in Idefics3, nanoVLM)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyllava_fast.config.ranges import Pixels
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.connectors.base import CONNECTORS, Connector


@CONNECTORS.register("pixel_shuffle")
class PixelShuffleConnector(Connector):
    """Space to depth, then a linear map without bias (arXiv:2408.12637): [N, K, V] -> [N, K / factor^2, D].

    The K tokens are a square grid, row by row. A block's channels are concatenated row by row too.
    """

    name = "pixel_shuffle"

    @dataclass(frozen=True, kw_only=True)
    class Options(Connector.Options):
        """Settings of the pixel shuffle."""

        factor: Pixels = 2
        """Patches a side of the block that becomes one token."""

    options: Options

    def __init__(self, vision_size: int, llm_size: int, options: Connector.Options | None = None) -> None:
        super().__init__(vision_size, llm_size, options)
        self.linear = nn.Linear(vision_size * self.options.factor**2, llm_size, bias=False)

    def num_tokens(self, num_features: int) -> int:
        """Return the number of blocks. Raise UserError unless K is a square grid that blocks tile."""
        factor, side = self.options.factor, math.isqrt(num_features)
        if side * side != num_features:
            raise UserError(
                f"model.connector: pixel_shuffle needs a square grid of tokens; {_not_square(num_features)}"
            )
        if side % factor:
            fits = ", ".join(str(f) for f in range(1, side + 1) if side % f == 0)
            raise UserError(
                f"model.connector.options.factor: blocks of {factor} x {factor} do not tile the tower's "
                f"{side} x {side} tokens; use a factor of {fits}, or a tower whose image_size / patch_size is a "
                f"multiple of {factor}"
            )
        return num_features // factor**2

    def forward(self, features: Tensor) -> Tensor:
        """[N, K, V] -> [N, K / factor^2, D]."""
        images, tokens, width = features.shape
        factor = self.options.factor
        side = math.isqrt(tokens) // factor  # blocks a side
        blocks = features.reshape(images, side, factor, side, factor, width).transpose(2, 3)
        return self.linear(blocks.reshape(images, side * side, factor * factor * width))

    def reads(self, features: Tensor) -> Tensor:
        """See the base class: each row is its block, whose patches count alike."""
        images, tokens, _ = features.shape
        factor, side = self.options.factor, math.isqrt(tokens)
        at = torch.arange(tokens, device=features.device)
        block = at // side // factor * (side // factor) + at % side // factor
        rows = torch.arange(tokens // factor**2, device=features.device)
        return ((block == rows[:, None]).to(features.dtype) / factor**2).expand(images, -1, -1)


def _not_square(tokens: int) -> str:
    """Return advice: the selection is off by the tokens in front of the patches, or by SigLIP's first one."""
    above = (math.isqrt(tokens) + 1) ** 2
    if above - tokens == 1:
        return f"{tokens} are one short of {above}: set model.vision.feature_select: cls_patch"
    extra = tokens - math.isqrt(tokens) ** 2
    return f"{tokens} are {extra} more than {tokens - extra}: set model.vision.feature_select: patch"
