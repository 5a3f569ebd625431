"""Perceiver resampler (Flamingo, arXiv:2204.14198): learnt latents read the image, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyllava_fast.config.ranges import Layers, Size
from tinyllava_fast.models.architecture import Values
from tinyllava_fast.models.connectors.base import CONNECTORS, Connector


@CONNECTORS.register("resampler")
class ResamplerConnector(Connector):
    """Each layer: latents attend to the image and themselves, then a feed-forward layer; both residual. Width D."""

    name = "resampler"

    @dataclass(frozen=True, kw_only=True)
    class Options(Connector.Options):
        """Settings of the resampler."""

        num_queries: Size = 128
        """Latents: rows that an image becomes."""
        num_layers: Layers = 3
        """Layers of attention and feed-forward."""
        num_heads: Size = 8
        """Attention heads."""
        head_size: Size = 64
        """Width of an attention head."""
        expansion: Size = 4
        """Width inside the feed-forward layers, in multiples of D."""

    @classmethod
    def tiny(cls) -> Values:
        """See the base class."""
        return {"num_queries": 3, "num_layers": 2, "num_heads": 2, "head_size": 4}

    options: Options

    def __init__(self, vision_size: int, llm_size: int, options: Connector.Options | None = None) -> None:
        super().__init__(vision_size, llm_size, options)
        o = self.options
        self.latents = nn.Parameter(torch.zeros(o.num_queries, llm_size))
        self.linear = nn.Linear(vision_size, llm_size)
        self.layers = nn.ModuleList(
            _Layer([_Attention(llm_size, o.num_heads, o.head_size), _feed_forward(llm_size, o.expansion)])
            for _ in range(o.num_layers)
        )
        self.norm = nn.LayerNorm(llm_size)

    def num_tokens(self, num_features: int) -> int:
        """Return the number of latents."""
        return self.options.num_queries

    def reset(self, generator: torch.Generator) -> None:
        """Linear weights from N(0, 0.02), biases zero, latents from N(0, 1)."""
        super().reset(generator)
        nn.init.normal_(self.latents, generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        """[N, K, V] -> [N, num_queries, D]."""
        media = self.linear(features)
        latents = self.latents.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(media, latents)
        return self.norm(latents)

    def reads(self, features: Tensor) -> Tensor:
        """See the base class: the latents' attention to the image, the mean over layers and heads."""
        media = self.linear(features)
        latents = self.latents.expand(features.shape[0], -1, -1)
        found = []
        layer: Any
        for layer in self.layers:
            found.append(layer[0].weights(media, latents)[..., : media.shape[1]].mean(1))
            latents = layer(media, latents)
        shares = torch.stack(found).mean(0)
        return shares / shares.sum(-1, keepdim=True)


class _Layer(nn.ModuleList):
    """Attention and a feed-forward layer, each with its residual."""

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """Image [N, K, D], latents [N, Q, D] -> [N, Q, D]."""
        latents = self[0](media, latents) + latents
        return self[1](latents) + latents


class _Attention(nn.Module):
    """Latents [N, Q, D] attend to the image [N, K, D] and to one another; no biases."""

    def __init__(self, width: int, heads: int, head_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_size, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_size, bias=False)
        self.to_out = nn.Linear(heads * head_size, width, bias=False)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """Image [N, K, D], latents [N, Q, D] -> [N, Q, D], before the residual."""
        q, k, v = self._projected(media, latents)
        out = nn.functional.scaled_dot_product_attention(q, k, v)  # [N, heads, Q, head_size]
        return self.to_out(out.transpose(1, 2).flatten(2))

    def weights(self, media: Tensor, latents: Tensor) -> Tensor:
        """Return the attention of each latent to the image and the latents, [N, heads, Q, K + Q]."""
        q, k, _ = self._projected(media, latents)
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)

    def _projected(self, media: Tensor, latents: Tensor) -> tuple[Tensor, ...]:
        latents = self.norm_latents(latents)
        keys, values = self.to_kv(torch.cat([self.norm_media(media), latents], dim=1)).chunk(2, dim=-1)
        return tuple(x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.to_q(latents), keys, values))


def _feed_forward(width: int, expansion: int) -> nn.Sequential:
    inner = width * expansion
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, inner, bias=False), nn.GELU(), nn.Linear(inner, width, bias=False)
    )
