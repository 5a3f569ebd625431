"""Vision towers that are one transformers encoder, cut off at the layer whose output is read.

``feature_layer`` indexes transformers' ``hidden_states`` tuple, which has L + 1 entries for L layers: entry 0 is the
encoder's input, entry i the output of layer i, with no final norm. Layers above it are never built, nor are the
post-layernorm and the pooling head, and no tuple is kept: the last output of the shortened encoder is the entry.

Legend: N images, K tokens an image after selection, V tower width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.models.architecture import Values, VisionPart
from tinyllava_fast.models.attention import FULL
from tinyllava_fast.models.described import reading
from tinyllava_fast.models.hf import cast_parameters, check_keys, config_of, config_to_dict, load_pretrained, seeded
from tinyllava_fast.models.sources import ask_hub
from tinyllava_fast.models.vision.base import VISION, VisionTower, W

SELECTIONS = ("patch", "cls_patch")

E = TypeVar("E", bound="EncoderTower")


class EncoderTower(VisionTower):
    """A ViT of transformers: subclasses name its classes and list the modules up to the encoder.

    model: built from a config whose num_hidden_layers already ends at the selected layer.
    feature_select: "patch" drops the tokens in front of the patches, or the first patch where there are none, as
    TinyLLaVA Factory does; "cls_patch" keeps all; None: drops them if there are any.
    """

    model_classes: ClassVar[tuple[type[PreTrainedModel], ...]]  # the first one is built by default
    children_kept: ClassVar[tuple[str, ...]] = ("embeddings", "encoder")  # in the order they run

    def __init__(
        self,
        model: PreTrainedModel,
        feature_select: str | None,
        options: VisionTower.Options | None = None,
        where: str = "",
    ) -> None:
        super().__init__()
        config = model.config
        prefix = self.prefix_tokens(config)
        if feature_select is not None and feature_select not in SELECTIONS:
            raise UserError(f"{where}.feature_select: {feature_select!r}; {nearest(feature_select, SELECTIONS)}")
        self.config = config
        self.feature_select = feature_select or ("patch" if prefix else "cls_patch")
        self.options = options if options is not None else self.Options()
        for name in self.children_kept:
            self.add_module(name, getattr(model, name))
        self.hidden_size = config.hidden_size
        self.image_size = self.input_side(config, self.options)
        self.num_layers = config.num_hidden_layers
        self.num_dropped = max(prefix, 1) if self.feature_select == "patch" else 0
        self.num_tokens = (self.image_size // config.patch_size) ** 2 + prefix - self.num_dropped

    @classmethod
    def model_types(cls) -> list[str]:
        """transformers' ``model_type`` of each class that the tower accepts."""
        return [c.config_class.model_type for c in cls.model_classes]  # type: ignore[union-attr]

    @classmethod
    def _model_class(cls, model_type: str) -> type[PreTrainedModel]:
        return cls.model_classes[cls.model_types().index(model_type)]

    @classmethod
    def prefix_tokens(cls, config: PreTrainedConfig) -> int:
        """Return the number of tokens in front of the patches, such as CLIP's CLS."""
        return 0

    @classmethod
    def input_side(cls, config: PreTrainedConfig, options: VisionTower.Options) -> int:
        """Return the side of the input images in pixels."""
        return int(config.image_size)

    @classmethod
    def input_size(cls, path: str | None, config: Values, options: VisionTower.Options, where: str) -> int:
        """See the base class."""
        built = cls._stored(path, config, where) if path is not None else cls._given(config, where, strict=True)
        return cls.input_side(built, options)

    @classmethod
    def from_config(
        cls: type[E],
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
    ) -> E:
        """See the base class."""
        built = cls._stored(path, config, where) if path is not None else cls._given(config, where, strict=strict)
        cls._check(built, options, where)
        cls._truncate(built, feature_layer, where)
        model = cls._load(path, built, dtype, where) if path is not None else cls._draw(built, seed, dtype, where)
        return cls(model, feature_select, options, where).train()

    @classmethod
    def _draw(cls, config: PreTrainedConfig, seed: int | None, dtype: torch.dtype, where: str) -> PreTrainedModel:
        with (
            reading(f"{where}.config: this {config.model_type} is not usable as a {cls.name} tower", UserError),
            seeded(seed),
        ):
            return cls._model_class(config.model_type)._from_config(config, attn_implementation=FULL, dtype=dtype)

    @classmethod
    def _load(cls, path: str, config: PreTrainedConfig, dtype: torch.dtype, where: str) -> PreTrainedModel:
        if torch.get_default_device().type == "meta":
            return cls._draw(config, None, dtype, where)
        with reading(f"{where}.path: cannot load {path!r} as a {cls.name} tower", UserError):
            model, missing = load_pretrained(
                cls._model_class(config.model_type), path, config=config, dtype=dtype, attn_implementation=FULL
            )
        if missing := [name for name in missing if name.startswith(cls.children_kept)]:
            raise UserError(f"{where}.path: {path!r} lacks weights: {', '.join(missing)}")
        cast_parameters(model, dtype)
        return model

    @classmethod
    def _given(cls, values: Values, where: str, *, strict: bool) -> PreTrainedConfig:
        """Return the transformers config of a tower that is described in full."""
        built = config_of(cls.model_types()[0], values, f"{where}.config", strict=strict)
        cls._check_type(built, where)
        return built

    @classmethod
    def _stored(cls, path: str, overrides: Values, where: str) -> PreTrainedConfig:
        """Return the transformers config of pretrained weights, with overrides."""
        from transformers import AutoConfig

        ask_hub(path, f"{where}.path")
        with reading(f"{where}.path: cannot load {path!r} as a {cls.name} tower", UserError):
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        config = getattr(config, "vision_config", config)
        cls._check_type(config, where)
        check_keys(type(config), overrides, f"{where}.config")
        for key, value in overrides.items():
            setattr(config, key, value)
        return config

    @classmethod
    def _check_type(cls, config: PreTrainedConfig, where: str) -> None:
        if config.model_type in cls.model_types():
            for name in ("image_size", "patch_size"):
                if not isinstance(getattr(config, name, 1), int):
                    raise UserError(f"{where}.config.{name}: expected one whole number, got {getattr(config, name)!r}")
            if getattr(config, "num_channels", 3) != 3:
                raise UserError(
                    f"{where}.config.num_channels: expected 3, since images are RGB, got {config.num_channels}"
                )
            return
        towers = {n: VISION.get(n) for n in VISION}
        fits = [n for n, t in towers.items() if issubclass(t, EncoderTower) and config.model_type in t.model_types()]
        hint = f"; use {where}.type: {fits[0]}" if fits else ""
        raise UserError(f"{where}: a {config.model_type} is not a {cls.name} tower{hint}")

    @classmethod
    def _check(cls, config: PreTrainedConfig, options: VisionTower.Options | None, where: str) -> None:
        side = cls.input_side(config, options if options is not None else cls.Options())
        if side % config.patch_size:
            raise UserError(f"{where}.config: image_size {side} is not a multiple of patch_size {config.patch_size}")

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

    def embed(self, pixels: Tensor) -> Tensor:
        """[N, 3, image_size, image_size] -> the encoder's input, [N, tokens, V]."""
        hidden = pixels
        for name in self.children_kept[:-1]:
            hidden = getattr(self, name)(hidden)
        return hidden

    def forward(self, pixels: Tensor) -> Tensor:
        """See the base class."""
        hidden = self.encoder(self.embed(pixels)).last_hidden_state  # type: ignore[operator]
        return hidden[:, self.num_dropped :]

    @property
    def patch_numbers(self) -> list[int]:
        """See the base class."""
        patches = (self.image_size // self.config.patch_size) ** 2
        return [*[-1] * self.prefix_tokens(self.config), *range(patches)][self.num_dropped :]

    @property
    def layers(self) -> nn.ModuleList:
        """The encoder's layers that are built."""
        return self.encoder.layers  # type: ignore[return-value, union-attr]

    def layer_parameters(self, from_layer: int) -> list[nn.Parameter]:
        """See the base class."""
        return [p for layer in list(self.layers)[from_layer:] for p in layer.parameters()]

    def describe(self) -> VisionPart:
        """See the base class. The config ends at the selected layer, so it is read with feature_layer -1."""
        return VisionPart(
            type=self.name,
            config=config_to_dict(self.config),
            feature_select=self.feature_select,
            options=asdict(self.options),
        )

    @classmethod
    def from_reference_names(cls, state: Mapping[str, W]) -> dict[str, W]:
        """See the base class. transformers 4 put CLIP's and SigLIP's towers under ``vision_model.``."""
        renamed = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
        buffers = ("embeddings.position_ids",)  # written by transformers before 4.31
        return {k: v for k, v in renamed.items() if k.startswith(cls.children_kept) and k not in buffers}
