"""Gemma 2 (arXiv:2408.00118): capped logits, and a sliding window in every other layer."""

from __future__ import annotations

from tinyllava_fast.models.architecture import Values
from tinyllava_fast.models.llm.auto import AutoLLM
from tinyllava_fast.models.llm.base import LLMS, PAD_WITH_UNK


@LLMS.register("gemma2")
class Gemma2(AutoLLM):
    """Gemma 2; padded with <unk>, like Gemma."""

    name = "gemma2"
    model_types = ("gemma2",)
    template = "gemma"
    roles = PAD_WITH_UNK

    @classmethod
    def tiny(cls) -> Values:
        """See the base class."""
        return super().tiny() | {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 3,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
        }
