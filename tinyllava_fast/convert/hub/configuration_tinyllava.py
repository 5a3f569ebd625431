"""The configuration of a LLaVA-style model trained by tinyllava_fast."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, PreTrainedConfig


@strict
class TinyLlavaConfig(PreTrainedConfig):
    """Parts of the model as {type, config, options}, and how its prompts and pictures are made."""

    model_type = "tinyllava_fast"

    llm: dict[str, Any] | None = None
    """Language model; its ``config`` is a transformers config."""
    vision: dict[str, Any] | None = None
    """Vision tower, which ends at the layer that is read."""
    connector: dict[str, Any] | None = None
    """Maps features of the tower to rows of the language model."""
    image_token_id: int = 0
    """Stands in ``input_ids`` for one row of a picture."""
    image_token_count: int = 0
    """Rows of a picture."""
    image_mode: str = "square"
    """square: the image processor alone; pad: a square of the mean colour around the picture first."""
    reading: dict[str, Any] | None = None
    """Of pictures: whether EXIF data turns them (orientation) and what lies behind transparent ones (background)."""
    image_processor: str = ""
    """Class of transformers that makes pixels of pictures: module and name."""

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the language model's config."""
        if self.llm is None:
            return self
        values = dict(self.llm["config"])
        return CONFIG_MAPPING[values.pop("model_type")](**values)
