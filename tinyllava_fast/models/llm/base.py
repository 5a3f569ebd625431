"""The contract of language model families, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinyllava_fast.models.architecture import LLMPart, Values
from tinyllava_fast.models.attention import CachedKV, KVView
from tinyllava_fast.registry import Registry

PAD_WITH_UNK = {"pad_token": "unk_token"}  # as most families do
UNK_AS_PAD = {"unk_token": "pad_token"}


class LLMFamily(ABC):
    """Builds a transformers causal LM and finds its parts. It holds no weights: the LM is a plain module beside it."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Settings of this family alone."""

    def __init__(self, options: Options | None = None) -> None:
        self.options = options if options is not None else self.Options()

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]] = ()
    """transformers model types it takes, the first one where a config names none; (): any."""
    template: ClassVar[str] = "tokenizer"
    """Chat template that models of the family are trained with unless a run names another."""
    roles: ClassVar[Mapping[str, str]] = {}
    """Special tokens that take the text of another one, unless the tokenizer lacks that: {"pad_token": "unk_token"}."""

    @classmethod
    def tiny(cls) -> Values:
        """Return the transformers config of a model of a few kilobytes, 32 wide, with 61 tokens, for tests."""
        return {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "vocab_size": 61,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": None,
        }

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give special tokens the roles that the family's training gave them; applying it twice changes nothing."""
        for role, source in self.roles.items():
            if (text := getattr(tokenizer, source)) is not None:
                setattr(tokenizer, role, text)

    @abstractmethod
    def from_config(
        self,
        config: Values,
        *,
        seed: int | None,
        dtype: torch.dtype = torch.float32,
        where: str,
        strict: bool = True,
    ) -> PreTrainedModel:
        """Return a model with weights drawn from the seed (None: uninitialized).

        strict: refuse config keys that transformers does not know; one without model_type is of the family's first.
        """

    @abstractmethod
    def describe(self, llm: PreTrainedModel) -> LLMPart:
        """Return the description from which ``from_config`` builds the architecture."""

    @abstractmethod
    def from_pretrained(
        self, path: str, *, gguf_file: str | None, overrides: Values, dtype: torch.dtype, where: str
    ) -> PreTrainedModel:
        """Return a model with the weights of a folder, hub id or "package:<name>", in the given dtype."""

    def embedding(self, llm: nn.Module) -> nn.Embedding:
        """Return the input embedding; its weight is [V, D]."""
        return llm.get_input_embeddings()  # type: ignore[operator]

    def embedding_scale(self, llm: nn.Module) -> float:
        """Return the factor on every input row. Gemma multiplies rows by sqrt(D), image rows included.

        transformers 5 keeps it in the embedding module, which we do not call.
        """
        return float(getattr(self.embedding(llm), "scalar_embed_scale", 1.0))

    def hidden(
        self,
        llm: nn.Module,
        embeds: Tensor,
        position_ids: Tensor,
        **attention_kwargs: Tensor | KVView | CachedKV | None,
    ) -> Tensor:
        """Run the decoder body: [1, T, D] embeds and [1, T] positions -> [1, T, D] after the final norm.

        With ``cached``, a models.attention.CachedKV, there may be more rows than one.
        """
        body = llm.base_model
        return body(  # type: ignore[operator]
            inputs_embeds=embeds, position_ids=position_ids, use_cache=False, **attention_kwargs
        ).last_hidden_state

    def head(self, llm: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Return the output projection: weight [V, D] and bias [V] or None."""
        projection = llm.get_output_embeddings()  # type: ignore[operator]
        return projection.weight, getattr(projection, "bias", None)

    def logit_softcap(self, llm: nn.Module) -> float:
        """Return c where logits are c tanh(z / c) of the head's output z (Gemma 2); 0: they are z itself."""
        return float(getattr(llm.config, "final_logit_softcapping", None) or 0.0)

    def stop_ids(self, llm: nn.Module) -> frozenset[int]:
        """Return the tokens that end an answer according to the model's config, besides the template's own.

        A generation_config.json is not asked: a model folder does not keep it.
        """
        named = llm.config.eos_token_id  # type: ignore[union-attr]
        return frozenset(named if isinstance(named, list) else [] if named is None else [named])

    def layers(self, llm: nn.Module) -> nn.ModuleList:
        """Return the decoder layers, first to last."""
        return llm.base_model.layers  # type: ignore[union-attr,return-value]


LLMS: Registry[type[LLMFamily]] = Registry("language model", "tinyllava_fast.models.llm")


def families_for(model_type: str) -> list[str]:
    """Return the names of the families that state this transformers model type; ["auto"] if none does."""
    return [name for name in LLMS if model_type in LLMS.get(name).model_types] or ["auto"]
