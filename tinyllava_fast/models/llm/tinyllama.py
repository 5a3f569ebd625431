"""TinyLlama and every other model of the Llama architecture."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from tinyllava_fast.models.llm.auto import AutoLLM
from tinyllava_fast.models.llm.base import LLMS, pad_with_unk


@LLMS.register("tinyllama")
class TinyLlama(AutoLLM):
    """A Llama with Llama's SentencePiece tokenizer, padded with <unk>."""

    name = "tinyllama"
    model_types = ("llama",)
    template = "llama"

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """See the base class."""
        pad_with_unk(tokenizer)
