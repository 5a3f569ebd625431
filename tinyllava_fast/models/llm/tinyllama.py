"""TinyLlama and every other model of the Llama architecture."""

from __future__ import annotations

from tinyllava_fast.models.llm.auto import AutoLLM
from tinyllava_fast.models.llm.base import LLMS, PAD_WITH_UNK


@LLMS.register("tinyllama")
class TinyLlama(AutoLLM):
    """A Llama with Llama's SentencePiece tokenizer, padded with <unk>."""

    name = "tinyllama"
    model_types = ("llama",)
    template = "llama"
    roles = PAD_WITH_UNK
