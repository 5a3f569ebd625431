"""The model as three modules of plain torch operations, which other engines' exporters trace.

Tower and connector, the embedding, and the decoder with past and present K and V as inputs and outputs. They run the
components of an LMM as they are, under ``plain``.

Legend: N images, K rows an image, D width, B sequences, T new tokens, P earlier ones, V known tokens, L layers.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tinyllava_fast.errors import UserError
from tinyllava_fast.models.attention import CachedKV
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.ops._op import inlined

_FLEXIBLE_ROPES = ("dynamic", "longrope")
"""Kinds of positions whose frequencies depend on the length of a sequence, which a graph cannot choose by."""
_PROBE = 7
_TOLERANCE = 1e-3


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Run and trace graphs inside the block: no op of ours, no gradient, no warning."""
    theirs = logging.getLogger("transformers")  # tracers look at every attribute, which some of its properties warn of
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        with inlined(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.setLevel(level)


class VisionGraph(nn.Module):
    """Pixels [N, 3, side, side] to rows [N, K, D] as they enter the decoder."""

    def __init__(self, lmm: LMM) -> None:
        super().__init__()
        self.lmm = lmm

    def forward(self, pixel_values: Tensor) -> Tensor:
        """See the class."""
        return self.lmm.scale_embeddings(self.lmm.connector(self.lmm.vision(pixel_values)))


class EmbeddingGraph(nn.Module):
    """Ids [B, T] to rows [B, T, D] as they enter the decoder. rows: ids that it takes; those without a row are zero."""

    def __init__(self, lmm: LMM, rows: int) -> None:
        super().__init__()
        weight = lmm.family.embedding(lmm.llm).weight.detach()[:rows]
        self.weight = torch.cat([weight, weight.new_zeros(max(0, rows - len(weight)), weight.shape[1])])
        self.scale = lmm.scale_embeddings

    def forward(self, input_ids: Tensor) -> Tensor:
        """See the class."""
        return self.scale(nn.functional.embedding(input_ids, self.weight))


class DecoderGraph(nn.Module):
    """Rows and the K and V of earlier tokens to logits and the K and V of all. known: tokens that have a logit."""

    def __init__(self, lmm: LMM, known: int) -> None:
        super().__init__()
        self.lmm = lmm
        weight, bias = lmm.family.head(lmm.llm)
        self.weight = weight.detach()[:known]
        self.bias = None if bias is None else bias.detach()[:known]

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Return logits [B, T, V] and, a layer, K and V [B, Hkv, P + T, Dh].

        inputs_embeds [B, T, D]; attention_mask [B, P + T] int64, 0 at padding; position_ids [B, T] int64; past: a
        layer, K and V [B, Hkv, P, Dh].
        """
        cached = CachedKV(list(zip(past[::2], past[1::2], strict=True)), attention_mask)
        hidden = self.lmm.family.hidden(self.lmm.llm, inputs_embeds, position_ids, cached=cached)
        logits = self.lmm.cap_logits(nn.functional.linear(hidden, self.weight, self.bias))
        return logits, *(tensor for pair in cached.present for tensor in pair)

    def no_past(self, batch: int, length: int = 0) -> list[Tensor]:
        """Return zeros for ``past``."""
        lmm = self.lmm
        shapes = [(batch, heads, length, lmm.head_dim) for heads in lmm.num_kv_heads for _ in range(2)]
        return [torch.zeros(shape, dtype=lmm.dtype, device=lmm.device) for shape in shapes]


def input_names(lmm: LMM) -> list[str]:
    """Return names of the decoder's inputs, those of optimum and transformers.js."""
    past = [f"past_key_values.{layer}.{part}" for layer in range(lmm.num_layers) for part in ("key", "value")]
    return ["inputs_embeds", "attention_mask", "position_ids", *past]


def output_names(lmm: LMM) -> list[str]:
    """Return names of the decoder's outputs, likewise."""
    present = [f"present.{layer}.{part}" for layer in range(lmm.num_layers) for part in ("key", "value")]
    return ["logits", *present]


def check_graph(lmm: LMM, what: str) -> None:
    """Raise UserError for a language model whose graph, run in two parts, does not compute what the model does.

    what: of the export, for the message.
    """
    kind = lmm.llm.config.model_type
    rope = (getattr(lmm.llm.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in _FLEXIBLE_ROPES:
        raise UserError(
            f"llm.config.rope_parameters.rope_type: {rope}; its positions depend on the length, {what}'s not"
        )
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(lmm.vocab_size, (_PROBE,), generator=generator)
    embeds = lmm.scale_embeddings(lmm.family.embedding(lmm.llm).weight.detach()[rows])
    positions = torch.arange(_PROBE)
    graph, split = DecoderGraph(lmm, lmm.vocab_size), 4
    bounds = torch.tensor([0, _PROBE], dtype=torch.int32)
    with plain():
        expected = lmm.logits(lmm.decode(embeds, positions, cu_seqlens=bounds))
        found, past = [], graph.no_past(1)
        try:
            for part in (slice(0, split), slice(split, _PROBE)):
                mask = torch.ones(1, part.stop, dtype=torch.int64)
                logits, *past = graph(embeds[None, part], mask, positions[None, part], *past)
                found.append(logits[0])
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(f"llm: {what} cannot run {kind} with K and V as inputs: {error}") from error
    worst = float((torch.cat(found) - expected).abs().max() / expected.abs().max())
    if not worst < _TOLERANCE:
        raise UserError(
            f"llm: {kind} computes something else where K and V are a graph's inputs ({worst:.1g} of its largest "
            f"logit), so {what} export would answer otherwise"
        )
