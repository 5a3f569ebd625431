"""Qwen1.5, Qwen2 and Qwen2.5, which share one architecture."""

from __future__ import annotations

from tinyllava_fast.models.architecture import Values
from tinyllava_fast.models.llm.auto import AutoLLM
from tinyllava_fast.models.llm.base import LLMS, UNK_AS_PAD


@LLMS.register("qwen2")
class Qwen2(AutoLLM):
    """Qwen2. Its tokenizer pads with <|endoftext|>, which stands for unknown text too."""

    name = "qwen2"
    model_types = ("qwen2",)
    template = "qwen2_base"
    roles = UNK_AS_PAD

    @classmethod
    def tiny(cls) -> Values:
        """See the base class."""
        return super().tiny() | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
