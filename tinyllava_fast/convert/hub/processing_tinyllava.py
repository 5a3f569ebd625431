"""Texts and pictures to the model's arguments. A text is cut at ``<image>`` and each piece is tokenized by itself."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin

from tinyllava_fast.convert.hub.configuration_tinyllava import TinyLlavaConfig

IMAGE = "<image>"
_MODULES = "transformers.models."


class TinyLlavaProcessor(ProcessorMixin):
    """``processor(text=..., images=...)``; ``apply_chat_template`` makes the prompt of a conversation."""

    image_token = IMAGE

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.settings = TinyLlavaConfig()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> TinyLlavaProcessor:
        """Read a repository or a folder; kwargs: revision, token, cache_dir and the like."""
        kwargs = {k: v for k, v in kwargs.items() if k not in ("trust_remote_code", "_from_auto", "code_revision")}
        settings = TinyLlavaConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        module, name = settings.image_processor.rsplit(".", 1)
        if not module.startswith(_MODULES):
            raise ValueError(f"config.json: image_processor: {settings.image_processor} is no class of transformers")
        pixels = getattr(importlib.import_module(module), name).from_pretrained(pretrained_model_name_or_path, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, config=settings, **kwargs)
        made = cls(pixels, tokenizer, chat_template=tokenizer.chat_template)
        made.settings = settings
        return made

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, return_tensors: str = "pt", **_: Any
    ) -> BatchFeature:
        """Return input_ids and attention_mask [B, T], padded on the left, and pixel_values [N, 3, H, W].

        text: one or several, with ``<image>`` for each picture. images: PIL images in that order, nested or not.
        """
        texts = [text] if isinstance(text, str) else list(text or [""])
        pictures = list(_flat(images))
        if (wanted := sum(one.count(IMAGE) for one in texts)) != len(pictures):
            raise ValueError(f"the text has {wanted} times {IMAGE}, but there are {len(pictures)} pictures")
        rows = [self._ids(one) for one in texts]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        data: dict[str, Any] = {
            "input_ids": [[pad] * (longest - len(row)) + row for row in rows],
            "attention_mask": [[0] * (longest - len(row)) + [1] * len(row) for row in rows],
        }
        if pictures:
            ready = [self._ready(picture) for picture in pictures]
            data["pixel_values"] = self.image_processor(ready, return_tensors="pt")["pixel_values"].to(torch.float32)
        return BatchFeature(data, tensor_type=return_tensors)

    def _ids(self, text: str) -> list[int]:
        """Return token ids: what the tokenizer puts before a text once, then the pieces between the pictures."""
        whole = self.tokenizer("a", return_special_tokens_mask=True)
        front = whole["input_ids"][: whole["special_tokens_mask"].index(0)]
        room = [self.settings.image_token_id] * self.settings.image_token_count
        ids = list(front)
        for number, piece in enumerate(text.split(IMAGE)):
            ids += room * (number > 0)
            ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
        return ids

    def _ready(self, picture: Image.Image) -> Image.Image:
        reading = self.settings.reading or {}
        if reading.get("orientation") == "upright":
            picture = ImageOps.exif_transpose(picture)
        if reading.get("background") == "white" and picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        picture = picture.convert("RGB")
        side = max(picture.size)
        if self.settings.image_mode != "pad" or picture.size == (side, side):
            return picture
        mean = tuple(int(channel * 255) for channel in self.image_processor.image_mean)
        square = Image.new("RGB", (side, side), mean)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return square


def _flat(images: Any) -> Iterator[Image.Image]:
    if isinstance(images, (list, tuple)):
        for item in images:
            yield from _flat(item)
    elif images is not None:
        yield images
