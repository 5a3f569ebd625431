"""``pixel_shuffle`` as llama.cpp's projector type ``adapter``, which it has for GLM-Edge.

Its other projectors that merge patches cut a picture into tiles, choose a size for it, or put text around it. This one
takes one square picture and computes a convolution of 2 x 2 with stride 2, which is our connector, and then

    y -> linear -> layer norm -> gelu -> (gate * up) -> linear

The norm sees [y, -y, C, -C] with a large constant C: their mean is 0 and C alone makes up the variance, so the norm is
a division by a constant, which its own weights take back. gelu(y) - gelu(-y) = y, and the gate is a constant that the
last map divides by. So the rows are ours, up to llama.cpp's rounding of gelu.

The projector also puts a learnt row before and behind each picture. Here they are the rows of the tokens that stand
there in training, the space after ``USER:`` and the line break, and the chat template leaves those two out. Between two
pictures there is a line break alone, so a conversation has one picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinyllava_fast.data.templates.base import Template
from tinyllava_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KIND = "adapter"
_FACTOR = 2
_LARGE = 2.0**14
"""The constant that makes up the norm's variance; float16 holds it."""
_GATE = 16.0
"""Large enough that llama.cpp's gelu and silu return it unchanged."""
_USER = "USER: "
_QUESTIONS = ("What is the blue shape?", "is it red", "2 of them?", "(a) one")
PREPARE = """\
{%- if '<__media' in found.text -%}
{%- if found.text.split('<__media') | length > 2 or seen.images -%}
{{ raise_exception('this model takes one picture a conversation in llama.cpp') }}
{%- endif -%}
{%- set seen.images = true -%}
{%- set marker = '<__media' + found.text.split('<__media')[1].split('__>')[0] + '__>' -%}
{%- set found.user = USER | trim -%}
{%- set found.text = marker + (found.text.replace(marker, '') | trim) -%}
{%- endif -%}
"""
"""A message's picture first, without the space before it and the line break behind it."""


def check_shuffle(factor: int) -> None:
    """Raise UserError for blocks of another size than the projector merges."""
    if factor != _FACTOR:
        raise UserError(
            f"model.connector.options.factor: {factor}; llama.cpp merges blocks of {_FACTOR} x {_FACTOR} patches "
            f"of one picture: train with factor {_FACTOR}, or with mlp2x_gelu or linear"
        )


def surroundings(template: Template, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Return the tokens before and behind a picture. Raises UserError if they melt into the text around them."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    first = f"{template.system} {_USER}"
    later = f"{first}a{template.separator}b{template.eos}{_USER}"
    before, behind = ids(first)[-1], ids(f"\n{_QUESTIONS[0]}")[0]
    apart = all(ids(text) == [*ids(text.rstrip()), before] for text in (first, later))
    if not apart or any(ids(f"\n{question}") != [behind, *ids(question)] for question in _QUESTIONS):
        raise UserError(
            "tokenizer: the space before a picture or the line break behind it is no token of its own, which "
            "llama.cpp's projector for pixel_shuffle needs; train with mlp2x_gelu or linear, or a byte-level tokenizer"
        )
    return before, behind


def shuffle_tensors(weight: Tensor, before: Tensor, behind: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the projector's tensors under llama.cpp's names.

    weight: the connector's, [D, 4 V]. before, behind: rows [D] at a picture's ends.
    """
    width, dtype = weight.shape[0], weight.dtype
    blocks = weight.unflatten(1, (_FACTOR, _FACTOR, -1)).permute(0, 3, 1, 2)  # [D, V, 2, 2]
    yield "adapter.conv.weight", torch.cat([blocks, blocks.new_zeros(1, *blocks.shape[1:])])
    unit, row = torch.eye(width, dtype=dtype), torch.zeros(width + 1)
    row[-1] = _LARGE
    yield "adapter.conv.bias", row
    both = torch.cat([unit, -unit])  # [2 D, D]
    constants = torch.zeros(2 * width + 2, 1, dtype=dtype)
    constants[-2:] = torch.tensor([[1.0], [-1.0]], dtype=dtype)
    yield "adapter.linear.linear.weight", torch.cat([torch.cat([both, both.new_zeros(2, width)]), constants], dim=1)
    scale, shift = torch.zeros(2 * width + 2), torch.zeros(2 * width + 2)
    scale[: 2 * width] = _LARGE / math.sqrt(width + 1)
    shift[2 * width] = _GATE
    yield "adapter.linear.norm1.weight", scale
    yield "adapter.linear.norm1.bias", shift
    yield "adapter.linear.dense_h_to_4h.weight", torch.cat([both.T, both.new_zeros(width, 2)], dim=1)
    gate = torch.zeros(width, 2 * width + 2, dtype=dtype)
    gate[:, 2 * width] = 1
    yield "adapter.linear.gate.weight", gate
    yield "adapter.linear.dense_4h_to_h.weight", unit / _GATE
    yield "adapter.boi", before.float()
    yield "adapter.eoi", behind.float()
