"""Encoder layers of vision towers for inference: four products with what follows them, two norms, attention.

The stock layer passes over its widest activations four times more: bias, activation and both additions are here the
end of a product, and query, key and value one product. Legend: N images, K tokens an image, V width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from tinyllava_fast.infer.fast_model.linear import DecodeLinear
from tinyllava_fast.models.attention import full

_KINDS = (CLIPEncoderLayer, SiglipEncoderLayer)
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}


def takes(layer: Any) -> bool:
    """Return whether TowerLayer computes the same as this layer; of a subclass nobody can say."""
    if type(layer) not in _KINDS or layer.self_attn.config.hidden_act not in _ACTIVATIONS:
        return False
    return all(type(m) is nn.Linear for part in (layer.self_attn, layer.mlp) for n, m in _linears(part))


def _linears(part: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in part.named_children() if n.endswith("_proj") or n in ("fc1", "fc2")]


class TowerLayer(nn.Module):
    """The same function as the transformers layer it is made from, whose products it takes over."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.layer_norm1, self.layer_norm2 = layer.layer_norm1, layer.layer_norm2
        self.heads, self.scale = attention.num_heads, attention.scale
        self.activation = _ACTIVATIONS[attention.config.hidden_act]
        self.qkv = DecodeLinear([attention.q_proj, attention.k_proj, attention.v_proj], None)
        self.out = DecodeLinear([attention.out_proj], None)
        self.fc1, self.fc2 = DecodeLinear([mlp.fc1], None), DecodeLinear([mlp.fc2], None)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        """[N, K, V] -> [N, K, V]."""
        images, tokens, width = hidden_states.shape
        x = hidden_states.reshape(images * tokens, width)
        qkv = self.qkv(self.layer_norm1(x)).view(images, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        mixed = full(self, q, k, v, attention_mask, scaling=self.scale)[0].reshape(images * tokens, width)
        x = self.out(mixed, residual=x)
        y = self.fc1(self.layer_norm2(x), self.activation)
        return self.fc2(y, residual=x).view(images, tokens, width)


@torch.no_grad()
def prepare_tower(tower: nn.Module) -> None:
    """Replace the encoder layers of a tower, or of towers in it, by TowerLayers where they fit, in place."""
    for parent in list(tower.modules()):
        for name, child in list(parent.named_children()):
            if takes(child):
                setattr(parent, name, TowerLayer(child).eval())
