"""Q-Former (arXiv:2301.12597) trained from scratch, as TinyLLaVA Factory has it: learnt queries read the image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerEncoder

from tinyllava_fast.config.ranges import Layers, ShareBelowOne, Size
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.architecture import Values
from tinyllava_fast.models.connectors.base import CONNECTORS, INIT_STD, Connector, W


@CONNECTORS.register("qformer")
class QFormerConnector(Connector):
    """BLIP-2's encoder of queries over random weights of BERT's sizes: every second layer attends to the image.

    The queries first pass a norm without parameters and dropout; the last layer's rows are mapped to D.
    """

    name = "qformer"

    @dataclass(frozen=True, kw_only=True)
    class Options(Connector.Options):
        """Settings of the Q-Former; the defaults are BERT-base's."""

        num_queries: Size = 128
        """Rows that an image becomes."""
        hidden_size: Size = 768
        """Width of the queries."""
        num_layers: Layers = 12
        """Layers; those of even index have cross-attention to the image."""
        num_heads: Size = 12
        """Attention heads."""
        intermediate_size: Size = 3072
        """Width inside the feed-forward layers."""
        dropout: ShareBelowOne = 0.1
        """Probability of dropout in training, of activations and attention."""

        def __post_init__(self) -> None:
            if self.hidden_size % self.num_heads:
                raise UserError(f"hidden_size: {self.hidden_size} is not a multiple of num_heads {self.num_heads}")

    @classmethod
    def tiny(cls) -> Values:
        """See the base class."""
        return {"num_queries": 3, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}

    options: Options

    def __init__(self, vision_size: int, llm_size: int, options: Connector.Options | None = None) -> None:
        super().__init__(vision_size, llm_size, options)
        o = self.options
        config = Blip2QFormerConfig(
            hidden_size=o.hidden_size,
            num_hidden_layers=o.num_layers,
            num_attention_heads=o.num_heads,
            intermediate_size=o.intermediate_size,
            hidden_dropout_prob=o.dropout,
            attention_probs_dropout_prob=o.dropout,
            encoder_hidden_size=vision_size,
        )
        config._attn_implementation = "sdpa"
        self.query_tokens = nn.Parameter(torch.zeros(1, o.num_queries, o.hidden_size))
        self.norm = nn.LayerNorm(o.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)
        self.dropout = nn.Dropout(o.dropout)
        self.encoder = Blip2QFormerEncoder(config)
        self.projector = nn.Linear(o.hidden_size, llm_size)

    def num_tokens(self, num_features: int) -> int:
        """Return the number of queries."""
        return self.options.num_queries

    def reset(self, generator: torch.Generator) -> None:
        """Linear weights and queries from N(0, 0.02), biases zero."""
        super().reset(generator)
        nn.init.normal_(self.query_tokens, std=INIT_STD, generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        """[N, K, V] -> [N, num_queries, D]."""
        if features.shape[0] == 0:  # the encoder cannot; a row that is dropped gives every weight its zero gradient
            return self.forward(features.new_zeros(1, *features.shape[1:]))[:0]
        queries = self.dropout(self.norm(self.query_tokens)).expand(features.shape[0], -1, -1)
        read = self.encoder(queries, encoder_hidden_states=features, query_length=self.options.num_queries)
        return self.projector(read.last_hidden_state)

    def reads(self, features: Tensor) -> Tensor:
        """See the base class: the queries' cross-attention, the mean over its layers and heads."""
        found: list[Tensor] = []

        def note(module: Any, _: tuple[object, ...], given: dict[str, Tensor]) -> None:
            size = (module.num_attention_heads, module.attention_head_size)
            q = module.query(given["hidden_states"]).unflatten(-1, size).transpose(1, 2)
            k = module.key(given["encoder_hidden_states"]).unflatten(-1, size).transpose(1, 2)
            found.append((q @ k.transpose(-1, -2) * module.scaling).softmax(-1).mean(1))  # [N, Q, K]

        crossing = [layer.crossattention.attention for layer in self.encoder.layer if layer.has_cross_attention]
        hooks = [one.register_forward_pre_hook(note, with_kwargs=True) for one in crossing]
        try:
            self(features)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(found).mean(0)

    @classmethod
    def from_reference_names(cls, state: Mapping[str, W]) -> dict[str, W]:
        """See the base class: BERT's names for BLIP-2's, without the position buffer that nothing reads."""
        return {
            name.removeprefix("bert.").replace("attention.self.", "attention.attention."): tensor
            for name, tensor in state.items()
            if name != "bert.embeddings.position_ids"
        }
