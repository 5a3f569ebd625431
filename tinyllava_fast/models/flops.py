"""Useful floating-point operations of a training step: the numerator of MFU.

Useful is what the mathematics needs: real tokens only (no padding), the tower up to the selected layer, lm_head rows
that carry a label, causal attention's lower triangle, and the parts of the backward pass that some trainable weight
needs. Recomputation is not useful. A multiply-add counts as two; elementwise work counts as nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.models.vision._encoder import EncoderTower


@dataclass(frozen=True)
class Costs:
    """The sizes from which the FLOPs of a model follow."""

    decoder_weights: int  # elements of the decoder layers' matrices
    attention_width: int  # layers x heads x head size
    head_weights: int  # hidden size x vocabulary
    connector_weights: tuple[int, ...]  # elements of each connector matrix, first to last
    connector_rows: int  # tokens an image
    tower_flops: int  # forward of one image, kept layers only


@dataclass(frozen=True)
class Trains:
    """The components that get weight gradients."""

    llm: bool = True
    connector: bool = True
    vision: bool = False


def step_flops(costs: Costs, segments: Sequence[int], images: int, supervised: int, trains: Trains) -> dict[str, int]:
    """FLOPs of one step's forward and backward by component: tower, connector, decoder, attention, head.

    segments: real length of every sample, image tokens included. images: images encoded. supervised: labelled tokens.
    """
    anything = trains.llm or trains.connector or trains.vision
    below_decoder = anything  # embeddings or connector: the decoder must pass gradients down
    tokens = sum(segments)
    triangle = sum(n * (n + 1) // 2 for n in segments)
    connector = 0
    for index, weights in enumerate(costs.connector_weights):
        passes_down = trains.vision or (trains.connector and index > 0)
        connector += 2 * images * costs.connector_rows * weights * (1 + trains.connector + passes_down)
    return {
        "tower": images * costs.tower_flops * (3 if trains.vision else 1),
        "connector": connector,
        "decoder": 2 * tokens * costs.decoder_weights * (1 + trains.llm + below_decoder),
        "attention": 2 * 2 * triangle * costs.attention_width * (1 + 2 * below_decoder),
        "head": 2 * supervised * costs.head_weights * (1 + trains.llm + below_decoder),
    }


def pack_flops(costs: Costs, pack: PackedBatch, trains: Trains, *, cached: bool = False) -> dict[str, int]:
    """step_flops of one pack. cached: its images' features are known, so no tower runs."""
    lengths = [n for n in pack.cu_seqlens.diff().tolist() if n]
    parts = step_flops(costs, lengths, len(pack.pixel_values), pack.num_supervised, trains)
    return parts | {"tower": 0} if cached else parts


def costs_of(lmm: LMM) -> Costs:
    """Read the costs off a built model, whatever its architecture."""
    text = lmm.llm.config.get_text_config()
    head_dim = lmm.head_dim
    layers, heads = lmm.family.layers(lmm.llm), text.num_attention_heads  # OpenELM's differ from layer to layer
    return Costs(
        decoder_weights=_weights(layers),
        attention_width=(sum(heads) if isinstance(heads, list) else len(layers) * heads) * head_dim,
        head_weights=lmm.hidden_size * lmm.vocab_size,
        connector_weights=tuple(m.weight.numel() for m in lmm.connector.modules() if isinstance(m, nn.Linear)),
        connector_rows=lmm.tokens_per_image,
        tower_flops=tower_flops(lmm.vision),
    )


def tower_flops(tower: nn.Module) -> int:
    """Forward FLOPs of one image through the patch embeddings and layers of every encoder that a tower is made of."""
    total = 0
    for encoder in tower.modules():
        if isinstance(encoder, EncoderTower):
            hidden, patch, layers = encoder.hidden_size, encoder.config.patch_size, encoder.layers
            patches = (encoder.image_size // patch) ** 2
            tokens = encoder.num_tokens + encoder.num_dropped
            total += 2 * patches * hidden * encoder.config.num_channels * patch**2  # patch embedding
            total += 2 * tokens * _weights(layers) + 2 * 2 * tokens * tokens * hidden * len(layers)
    return total


def _weights(modules: Iterable[nn.Module]) -> int:
    linears = [m for module in modules for m in module.modules() if isinstance(m, nn.Linear)]
    return sum(linear.weight.numel() for linear in linears)
