"""A linear layer for inference, dense or quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinyllava_fast.ops import NF4, Int8, quantize_int8, quantize_nf4
from tinyllava_fast.ops.decode_linear import in_huge_pages
from tinyllava_fast.ops.linear import linear


class DecodeLinear(nn.Module):
    """[..., in] -> [..., out]: layers of one input, their outputs side by side, each weight held once.

    sizes: outputs of each layer.
    """

    def __init__(self, layers: Sequence[Any], weights: str | None) -> None:
        """layers: what has ``weight`` [out, in] and ``bias``. weights: "int8", "nf4"; otherwise dense."""
        super().__init__()
        self.sizes = [len(layer.weight) for layer in layers]
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.out_features, self.in_features = weight.shape
        self.blocksize = 0
        if weights == "nf4":
            held: tuple[Any, ...] = quantize_nf4(weight)
            self.blocksize = held[3]
        else:
            held = quantize_int8(weight) if weights == "int8" else (weight, None)
        self.register_buffer("values", in_huge_pages(held[0]))
        self.register_buffer("scales", None if held[1] is None else in_huge_pages(held[1]))
        self.register_buffer("bias", _side_by_side(layers))

    @property
    def held(self) -> Tensor | Int8 | NF4:
        """The weight as the ops take it."""
        values: Any = self.values
        scales: Any = self.scales
        if scales is None:
            return values
        if self.blocksize:
            return NF4(values, scales, (self.out_features, self.in_features), self.blocksize)
        return Int8(values, scales)

    @property
    def shift(self) -> Tensor | None:
        """The bias [out]."""
        bias: Any = self.bias
        return bias

    def forward(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        """x [..., in] of the model's dtype -> [..., out], as ops.linear takes it."""
        return linear(x, self.held, self.shift, activation=activation, residual=residual)


def _side_by_side(layers: Sequence[Any]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    zeros = (layer.weight.new_zeros(layer.weight.shape[0]) for layer in layers)
    return torch.cat([z if layer.bias is None else layer.bias.detach() for z, layer in zip(zeros, layers, strict=True)])
