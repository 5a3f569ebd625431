"""Gemma 2 (arXiv:2408.00118): capped logits, and a sliding window in every other layer."""

from __future__ import annotations

from typing import Any

from tinyllava_fast.models.llm.auto import AutoLLM
from tinyllava_fast.models.llm.base import LLMS, pad_with_unk


@LLMS.register("gemma2")
class Gemma2(AutoLLM):
    """Gemma 2; padded with <unk>, like Gemma."""

    name = "gemma2"
    model_types = ("gemma2",)
    template = "gemma"

    def prepare_tokenizer(self, tokenizer: Any) -> None:
        """See the base class."""
        pad_with_unk(tokenizer)
