"""Qwen3 (arXiv:2505.09388): Qwen2 with normalized query and key heads."""

from __future__ import annotations

from tinyllava_fast.models.architecture import Values
from tinyllava_fast.models.llm.auto import AutoLLM
from tinyllava_fast.models.llm.base import LLMS, UNK_AS_PAD


@LLMS.register("qwen3")
class Qwen3(AutoLLM):
    """Qwen3. Released models are instruction-tuned and end a turn with <|im_end|>."""

    name = "qwen3"
    model_types = ("qwen3",)
    template = "qwen2_instruct"
    roles = UNK_AS_PAD

    @classmethod
    def tiny(cls) -> Values:
        """See the base class."""
        return super().tiny() | {"head_dim": 16}
