"""Useful floating-point operations of a training step: the numerator of MFU.

Useful is what the mathematics needs: real tokens only (no padding), the tower up to the selected layer, lm_head rows
that carry a label, causal attention's lower triangle, and the parts of the backward pass that some trainable weight
needs. Recomputation is not useful. A multiply-add counts as two; elementwise work counts as nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from tinyllava_fast.models.lmm import LMM


@dataclass(frozen=True)
class Costs:
    """What the FLOPs of a model are made of."""

    decoder_weights: int  # elements of the decoder layers' matrices
    attention_width: int  # layers x heads x head size
    head_weights: int  # hidden size x vocabulary
    connector_weights: tuple[int, ...]  # elements of each connector matrix, first to last
    connector_rows: int  # tokens an image
    tower_flops: int  # forward of one image, kept layers only


@dataclass(frozen=True)
class Trains:
    """Which components get weight gradients."""

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


def costs_of(lmm: LMM) -> Costs:
    """Read the costs off a built model, whatever its architecture."""
    text = lmm.llm.config.get_text_config()
    head_dim = lmm.head_dim
    layers, heads = lmm.adapter.layers(lmm.llm), text.num_attention_heads  # OpenELM's differ from layer to layer
    return Costs(
        decoder_weights=_weights(layers),
        attention_width=(sum(heads) if isinstance(heads, list) else len(layers) * heads) * head_dim,
        head_weights=lmm.hidden_size * lmm.vocab_size,
        connector_weights=tuple(m.weight.numel() for m in lmm.connector.modules() if isinstance(m, nn.Linear)),
        connector_rows=lmm.tokens_per_image,
        tower_flops=tower_flops(lmm.vision, image_size=lmm.image_size),
    )


def tower_flops(tower: nn.Module, *, image_size: int) -> int:
    """Forward FLOPs of one square image through a ViT tower's patch embedding and the layers that were built."""
    patches = next(m for m in tower.modules() if isinstance(m, nn.Conv2d))
    layers = next(m for m in tower.modules() if isinstance(m, nn.ModuleList))
    grid = (image_size // patches.kernel_size[0]) ** 2
    table = next((m for m in tower.modules() if isinstance(m, nn.Embedding)), None)
    tokens = table.num_embeddings if table is not None else grid  # a CLS token adds a row to the position table
    hidden = patches.out_channels
    attention = 2 * 2 * tokens * tokens * hidden * len(layers)
    return 2 * grid * patches.weight.numel() + 2 * tokens * _weights(layers) + attention


def _weights(modules: Iterable[nn.Module]) -> int:
    linears = [m for module in modules for m in module.modules() if isinstance(m, nn.Linear)]
    return sum(linear.weight.numel() for linear in linears)
