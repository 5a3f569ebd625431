"""Phi-1, Phi-1.5 and Phi-2."""

from __future__ import annotations

from tinyllava_fast.models.architecture import Values
from tinyllava_fast.models.llm.auto import AutoLLM
from tinyllava_fast.models.llm.base import LLMS, PAD_WITH_UNK


@LLMS.register("phi")
class Phi(AutoLLM):
    """Phi; its tokenizer has one special token, <|endoftext|>, which also pads."""

    name = "phi"
    model_types = ("phi",)
    template = "phi"
    roles = PAD_WITH_UNK

    @classmethod
    def tiny(cls) -> Values:
        """See the base class."""
        return super().tiny() | {"resid_pdrop": 0.0}
