"""The contract of vision towers and their registry.

Legend: N images, K tokens an image after selection, V tower width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor

from tinyllava_fast.errors import UserError
from tinyllava_fast.models.architecture import Values, VisionPart
from tinyllava_fast.registry import Registry

W = TypeVar("W", bound="Splittable")
C = TypeVar("C")


class Splittable(Protocol):
    """A weight, read or not."""

    def chunk(self: C, chunks: int, dim: int = 0) -> Sequence[C]:
        """Return equal parts, as Tensor.chunk does."""


class VisionTower(nn.Module, ABC):
    """The whole contract a connector needs. Children carry transformers' names, so its state dict is stock."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Settings of this tower alone."""

    name: ClassVar[str]
    processor_class: ClassVar[type[BaseImageProcessor]]  # a transformers *ImageProcessorPil
    hidden_size: int  # V
    num_tokens: int  # K
    image_size: int  # pixels, square
    num_layers: int  # layers that are built
    feature_select: str  # "patch" or "cls_patch"

    @classmethod
    def tiny(cls) -> dict[str, Values]:
        """Return ``config`` and ``options`` of ``model.vision`` for tests: 32 wide, images of 16 pixels."""
        sizes: Values = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
        return {"config": sizes | {"patch_size": 8, "image_size": 16}}

    @abstractmethod
    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, image_size, image_size] of any float dtype -> [N, K, V] in the tower's dtype."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the towers whose channels are concatenated; their sum is V."""
        return (self.hidden_size,)

    @property
    def layers(self) -> Sequence[nn.Module] | nn.ModuleList:
        """The repeated layers that are built; none, for a tower that does not name them."""
        return ()

    @property
    def patch_numbers(self) -> list[int]:
        """The patch that each of the K tokens began as, counted row by row in a square grid; -1: none, such as CLS.

        A tower whose K is no square states it itself. UserError where it does not.
        """
        if math.isqrt(self.num_tokens) ** 2 != self.num_tokens:
            raise UserError(
                f"the {self.name} tower has {self.num_tokens} tokens, which are no square grid: give its class a "
                "patch_numbers that says where they lie"
            )
        return list(range(self.num_tokens))

    @abstractmethod
    def layer_parameters(self, from_layer: int) -> list[nn.Parameter]:
        """Return the parameters of layers from_layer..num_layers - 1."""

    @abstractmethod
    def describe(self) -> VisionPart:
        """Return the description from which ``from_config`` builds the architecture."""

    @classmethod
    def from_config(
        cls,
        config: Values,
        *,
        path: str | None = None,
        feature_layer: int,
        feature_select: str | None,
        options: Options | None = None,
        seed: int | None = None,
        dtype: torch.dtype = torch.float32,
        where: str,
        strict: bool = True,
    ) -> VisionTower:
        """Return a tower with weights drawn from the seed (None: uninitialized).

        path: folder or hub id of the tower alone or of a whole image-text model, whose weights it has instead; config
        then holds what overrides the one there. On the meta device its weights are not read. feature_select None: the
        tower's default. strict: refuse config keys that transformers does not know.
        """
        raise NotImplementedError

    @classmethod
    def input_size(cls, path: str | None, config: Values, options: Options, where: str) -> int:
        """Return the side in pixels of the images that such a tower takes, without building it."""
        raise NotImplementedError

    @classmethod
    def image_processor(cls, image_size: int) -> BaseImageProcessor:
        """Return the PIL image processor of this family for a size: no pretrained files needed."""
        raise NotImplementedError

    @classmethod
    def from_reference_names(cls, state: Mapping[str, W]) -> dict[str, W]:
        """Return the weights under TinyLLaVA Factory's names (transformers 4.40, its tower prefix removed) under ours.

        What no tower of ours has, such as pooling heads, is left out; layers above the selected one are not.
        """
        raise NotImplementedError


VISION: Registry[type[VisionTower]] = Registry("vision tower", "tinyllava_fast.models.vision")
