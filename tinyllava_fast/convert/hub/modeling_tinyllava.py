"""A LLaVA-style model: vision tower, connector, language model. Pictures become rows among those of the tokens.

Legend: B batch, T tokens, N pictures, K rows a picture, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from tinyllava_fast.convert.hub.configuration_tinyllava import TinyLlavaConfig
from tinyllava_fast.convert.hub.parts_tinyllava import connector_class, tower_class


def build_tower(part: dict[str, Any]) -> nn.Module:
    """Return a tower with the weights of no checkpoint; part as in ``TinyLlavaConfig.vision``."""
    if part["type"] != "mof":
        return _encoder(part["type"], part["config"], part["feature_select"], part["options"])
    half = part["options"]["dinov2"]
    clip = _encoder("clip", part["config"], part["feature_select"], {})
    options = {"image_size": clip.image_size, "interpolation": half["interpolation"]}
    return tower_class("mof")(clip, _encoder("dinov2", half["config"], part["feature_select"], options))


def _encoder(name: str, config: dict[str, Any], feature_select: str | None, options: dict[str, Any]) -> nn.Module:
    tower, values = tower_class(name), dict(config)
    kind = values.pop("model_type")
    model = next(c for c in tower.model_classes if c.config_class.model_type == kind)
    return tower(model(model.config_class(**values)), feature_select, tower.Options(**options))


class TinyLlavaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Answers questions about pictures by ``generate``; ``TinyLlavaProcessor`` makes its arguments."""

    config_class = TinyLlavaConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 transformers declares lists
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _can_compile_fullgraph = False

    def __init__(self, config: TinyLlavaConfig) -> None:
        super().__init__(config)
        assert config.llm is not None and config.vision is not None and config.connector is not None  # noqa: S101
        self.vision = build_tower(config.vision)
        asked = config._attn_implementation  # sdpa, the default, is not every language model's
        self.llm = AutoModelForCausalLM.from_config(
            config.get_text_config(), attn_implementation=None if asked == "sdpa" else asked
        )
        connector = connector_class(config.connector["type"])
        options = connector.Options(**config.connector["options"])
        self.connector = connector(self.vision.hidden_size, self.llm.config.hidden_size, options)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the tokens."""
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of the tokens."""
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the projection to logits."""
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the projection to logits."""
        self.llm.set_output_embeddings(new_embeddings)

    def _init_weights(self, module: nn.Module) -> None:
        """Fill a buffer that no file holds; loading calls it for each module."""
        super()._init_weights(module)
        for name, buffer in module.named_buffers(recurse=False):
            if name == "position_ids":
                with torch.no_grad():
                    buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, K, D] rows that enter the language model."""
        rows = self.connector(self.vision(pixel_values.to(self.dtype)))
        # Gemma's embedding multiplies the rows of tokens; in training those of pictures were multiplied, too.
        scale = getattr(self.get_input_embeddings(), "scalar_embed_scale", 1.0)
        return rows if scale == 1.0 else rows * torch.full((), scale, dtype=rows.dtype, device=rows.device)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V]. input_ids [B, T] hold ``image_token_id`` K times for each of the pictures, in order."""
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give either input_ids or inputs_embeds")
            is_image = input_ids == self.config.image_token_id
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
            if pixel_values is not None:
                rows = self.encode_images(pixel_values).flatten(0, 1)
                if int(is_image.sum()) != len(rows):
                    raise ValueError(f"input_ids have room for {int(is_image.sum())} rows of pictures, not {len(rows)}")
                inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None], rows.to(inputs_embeds.dtype))
        return self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the arguments of one pass; pictures enter the first one, and all without a cache."""
        pixel_values = kwargs.pop("pixel_values", None)
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_first_iteration") or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
        return inputs
