"""Decoder layers of the Llama kind for inference: four products and three fused steps between them.

transformers runs such a layer as some sixty operators, whose calls take longer than a small model's weights take to
read. Here query, key and value are one product, gate and up another. Legend: T tokens, D width, H heads, Dh head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from tinyllava_fast.infer.fast_model.linear import DecodeLinear
from tinyllava_fast.models.attention import packed
from tinyllava_fast.ops.decode_block import rms_norm, rotate

PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Of each product of a DecodeLayer the layers that it stands for."""
_KINDS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)


def takes(layer: Any, config: Any) -> bool:
    """Return whether DecodeLayer computes the same as this layer; of a subclass nobody can say."""
    if type(layer) not in _KINDS or config.hidden_act != "silu":
        return False
    parts = (layer.self_attn, layer.mlp)
    return all(type(m) is nn.Linear for part in parts for n, m in part.named_children() if n.endswith("_proj"))


class DecodeLayer(nn.Module):
    """The same function as the transformers layer it is made from, whose products it takes over."""

    def __init__(self, layer: Any, weights: str | None) -> None:
        super().__init__()
        attention = layer.self_attn
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.heads = attention.q_proj.out_features // attention.head_dim
        self.kv_heads = attention.k_proj.out_features // attention.head_dim
        # Mistral's attention asks its config for it
        self.window = getattr(attention, "sliding_window", None)
        if isinstance(layer, MistralDecoderLayer):
            self.window = getattr(attention.config, "sliding_window", None)

        def product(name: str) -> DecodeLinear:
            return DecodeLinear([layer.get_submodule(part) for part in PARTS[name]], weights)

        self.qkv, self.o = product("qkv"), product("o")
        self.gate_up, self.down = product("gate_up"), product("down")
        self.self_attn = attention  # what packed() asks about, and Qwen3's norms; its products are held once, above
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            delattr(attention, name)

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Tensor:
        """hidden_states [1, T, D] -> the same shape. Keywords as packed() takes them."""
        attention = self.self_attn
        x = hidden_states[0]
        cosine, sine = position_embeddings[0][0], position_embeddings[1][0]
        heads, rotated = self.heads, self.heads + self.kv_heads
        qkv = self.qkv(_norm(x, self.input_layernorm)).view(len(x), rotated + self.kv_heads, -1)
        qk = qkv[:, :rotated]
        if hasattr(attention, "q_norm"):
            parts = (qk[:, :heads].flatten(0, 1), qk[:, heads:].flatten(0, 1))
            norms = (attention.q_norm, attention.k_norm)
            q, k = (_norm(p, n).view(len(x), -1, qk.shape[-1]) for p, n in zip(parts, norms, strict=True))
            q, k = rotate.infer(q, heads, cosine, sine), rotate.infer(k, self.kv_heads, cosine, sine)
        else:
            qk = rotate.infer(qkv, rotated, cosine, sine)
            q, k = qk[:, :heads], qk[:, heads:]
        kwargs.setdefault("attention_mask", None)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, qkv[:, rotated:]))
        out = packed(attention, q, k, v, scaling=attention.scaling, sliding_window=self.window, **kwargs)[0]
        x = self.o(out.reshape(len(x), -1), residual=x)
        y = self.gate_up(_norm(x, self.post_attention_layernorm), "silu_gate")
        return self.down(y, residual=x)[None]


def _norm(x: Tensor, module: Any) -> Tensor:
    return rms_norm.infer(x, module.weight, module.variance_epsilon)
