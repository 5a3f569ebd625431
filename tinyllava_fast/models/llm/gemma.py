"""Gemma (arXiv:2403.08295): every row that enters the decoder is scaled by sqrt(hidden_size)."""

from __future__ import annotations

from tinyllava_fast.models.architecture import Values
from tinyllava_fast.models.llm.auto import AutoLLM
from tinyllava_fast.models.llm.base import LLMS, PAD_WITH_UNK


@LLMS.register("gemma")
class Gemma(AutoLLM):
    """Gemma; padded with <unk>."""

    name = "gemma"
    model_types = ("gemma",)
    template = "gemma"
    roles = PAD_WITH_UNK

    @classmethod
    def tiny(cls) -> Values:
        """See the base class."""
        return super().tiny() | {"head_dim": 8}
