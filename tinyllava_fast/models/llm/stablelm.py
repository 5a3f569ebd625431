"""StableLM 2 (arXiv:2402.17834)."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.stablelm.modeling_stablelm import StableLmDecoderLayer

from tinyllava_fast.models.architecture import Values
from tinyllava_fast.models.llm.auto import AutoLLM
from tinyllava_fast.models.llm.base import LLMS


class PackedStableLmDecoderLayer(StableLmDecoderLayer):
    """The same layer, except that keyword arguments of attention (cu_seqlens, prefix, kv) reach the attention module.

    transformers' own forward accepts and drops them.
    """

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:  # type: ignore[override]
        """hidden_states [1, T, D] -> the same shape; other arguments as in the attention module."""
        normed = self.input_layernorm(hidden_states)
        attended = hidden_states + self.self_attn(normed, **kwargs)[0]
        if self.post_attention_layernorm is not None:  # not the parallel form, in which both read the first norm
            normed = self.post_attention_layernorm(attended)
        return attended + self.dropout(self.mlp(normed))


@LLMS.register("stablelm")
class StableLM(AutoLLM):
    """StableLM; its tokenizer's special tokens are used as they are."""

    name = "stablelm"
    model_types = ("stablelm",)
    template = "phi"

    @classmethod
    def tiny(cls) -> Values:
        """See the base class."""
        return super().tiny() | {"use_qkv_bias": True, "qk_layernorm": True, "partial_rotary_factor": 0.5}

    def adapt(self, llm: PreTrainedModel) -> None:
        """See the base class. Parameters, their names and hooks on the layers stay what they are."""
        for layer in self.layers(llm):
            layer.__class__ = PackedStableLmDecoderLayer
