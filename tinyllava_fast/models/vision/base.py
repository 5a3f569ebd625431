"""Vision towers: transformers encoders cut off at the layer whose output is read.

``feature_layer`` indexes transformers' ``hidden_states`` tuple, which has L + 1 entries for L layers: entry 0 is the
encoder's input, entry i the output of layer i, with no final norm. Layers above it are never built, nor are the
post-layernorm and the pooling head, and no tuple is kept: the last output of the shortened encoder is the entry.

Legend: N images, K tokens an image after selection, V tower width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tinyllava_fast.errors import UserError
from tinyllava_fast.models.attention import FULL
from tinyllava_fast.models.hf import cast_parameters, check_keys, config_of, config_to_dict, seeded
from tinyllava_fast.registry import Registry


class VisionTower(nn.Module, ABC):
    """The whole contract a connector needs. Children carry transformers' names, so its state dict is stock."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Settings of this tower alone."""

    name: ClassVar[str]
    hidden_size: int  # V
    num_tokens: int  # K
    image_size: int  # pixels, square
    num_layers: int  # layers that are built

    @abstractmethod
    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, image_size, image_size] -> [N, K, V] in the tower's dtype."""

    @abstractmethod
    def layer_parameters(self, from_layer: int) -> list[nn.Parameter]:
        """Parameters of layers from_layer..num_layers - 1."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """JSON values from which ``from_config`` builds a tower of the same architecture."""


VISION: Registry[type[EncoderTower]] = Registry("vision tower", "tinyllava_fast.models.vision")


class EncoderTower(VisionTower):
    """A ViT of transformers: subclasses name its classes and list the modules before the encoder.

    config: the transformers vision config, whose num_hidden_layers already ends at the selected layer.
    feature_select: "all" or "patch" (drop the first token).
    """

    model_class: ClassVar[type[PreTrainedModel]]
    processor_class: ClassVar[Any]
    model_type: ClassVar[str]
    children_kept: ClassVar[tuple[str, ...]]  # transformers' names, in the order they run; the last is the encoder
    num_prefix_tokens: ClassVar[int]  # tokens in front of the patches, such as CLIP's CLS

    def __init__(self, model: PreTrainedModel, feature_select: str, options: Any = None) -> None:
        super().__init__()
        config = model.config
        self.config = config
        self.feature_select = feature_select
        self.options: Any = options if options is not None else self.Options()
        for name in self.children_kept:
            self.add_module(name, getattr(model, name))
        patches = (config.image_size // config.patch_size) ** 2
        self.hidden_size = config.hidden_size
        self.image_size = config.image_size
        self.num_layers = config.num_hidden_layers
        self.num_tokens = patches + self.num_prefix_tokens - (1 if feature_select == "patch" else 0)

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        *,
        feature_layer: int,
        feature_select: str,
        options: Any = None,
        seed: int | None,
        dtype: torch.dtype = torch.float32,
        where: str,
        strict: bool = True,
    ) -> EncoderTower:
        """A tower with weights drawn from the seed (None: uninitialised)."""
        built = config_of(cls.model_type, config, f"{where}.config", strict=strict)
        _check(cls, built, where)
        cls._truncate(built, feature_layer, where)
        with seeded(seed):
            model = cls.model_class._from_config(built, attn_implementation=FULL, dtype=dtype)
        return cls(model, feature_select, options).train()

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        overrides: dict[str, Any],
        feature_layer: int,
        feature_select: str,
        options: Any = None,
        dtype: torch.dtype,
        where: str,
    ) -> EncoderTower:
        """A tower with the weights of a folder or hub id: the tower alone or the whole image-text model."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            config = getattr(config, "vision_config", config)
            _check(cls, config, where)
            check_keys(type(config), overrides, f"{where}.config")
            for key, value in overrides.items():
                setattr(config, key, value)
            cls._truncate(config, feature_layer, where)
            loaded: Any = cls.model_class.from_pretrained(
                path, config=config, dtype=dtype, attn_implementation=FULL, output_loading_info=True
            )
        except (OSError, RuntimeError) as error:
            raise UserError(f"{where}.path: cannot load {path!r} as a {cls.name} tower: {error}") from None
        model, report = loaded
        missing = [k for k in report["missing_keys"] if not k.startswith("post_layernorm")]
        if missing:
            raise UserError(f"{where}.path: {path!r} lacks weights: {', '.join(sorted(missing))}")
        cast_parameters(model, dtype)
        return cls(model, feature_select, options).train()

    @classmethod
    def _truncate(cls, config: PreTrainedConfig, feature_layer: int, where: str) -> None:
        """Shorten the config to the selected layer."""
        layers = config.num_hidden_layers
        kept = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
        if not 0 <= kept <= layers:
            raise UserError(
                f"{where}.feature_layer: {feature_layer} is outside hidden_states of a tower with {layers} layers; "
                f"use {-layers - 1}..{layers}"
            )
        config.num_hidden_layers = kept

    def forward(self, pixels: Tensor) -> Tensor:
        """See the base class."""
        *before, encoder = (getattr(self, name) for name in self.children_kept)
        hidden = pixels
        for module in before:
            hidden = module(hidden)
        hidden = encoder(inputs_embeds=hidden).last_hidden_state  # [N, tokens, V]
        return hidden[:, 1:] if self.feature_select == "patch" else hidden

    def layer_parameters(self, from_layer: int) -> list[nn.Parameter]:
        """See the base class."""
        return [p for layer in list(self.encoder.layers)[from_layer:] for p in layer.parameters()]  # type: ignore

    def to_config(self) -> dict[str, Any]:
        """See the base class; feature_layer is -1, since the stored config ends at the selected layer."""
        return {
            "type": self.name,
            "config": config_to_dict(self.config),
            "feature_select": self.feature_select,
            "options": asdict(self.options),
        }

    @classmethod
    def image_processor(cls, image_size: int) -> Any:
        """The PIL image processor of this family for a size: no pretrained files needed."""
        raise NotImplementedError


def _check(cls: type[EncoderTower], config: PreTrainedConfig, where: str) -> None:
    if config.model_type != cls.model_type:
        known = {VISION.get(n).model_type: n for n in VISION}
        hint = f"; use {where}.type: {known[config.model_type]}" if config.model_type in known else ""
        raise UserError(f"{where}: a {config.model_type} is not a {cls.name} tower{hint}")
    if config.image_size % config.patch_size:
        raise UserError(
            f"{where}.config: image_size {config.image_size} is not a multiple of patch_size {config.patch_size}"
        )
