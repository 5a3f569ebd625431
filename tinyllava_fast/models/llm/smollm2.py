"""SmolLM2 (arXiv:2502.02737): the Llama architecture with a byte-level tokenizer."""

from __future__ import annotations

from tinyllava_fast.models.architecture import Values
from tinyllava_fast.models.llm.auto import AutoLLM
from tinyllava_fast.models.llm.base import LLMS


@LLMS.register("smollm2")
class SmolLM2(AutoLLM):
    """A Llama whose tokenizer has a padding token of its own and <|endoftext|> among its special tokens."""

    name = "smollm2"
    model_types = ("llama",)
    template = "phi"

    @classmethod
    def tiny(cls) -> Values:
        """See the base class."""
        return super().tiny() | {"tie_word_embeddings": True}
