"""The modules that exporters trace compute what the model computes, for every family, tower and connector."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.models.llm.families import CONFIGS
from tests.tiny import tiny_config
from tinyllava_fast.config.schema import ConnectorConfig, LLMConfig, ModelConfig, VisionConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.build import build_model
from tinyllava_fast.models.connectors.base import CONNECTORS
from tinyllava_fast.models.graphs import DecoderGraph, EmbeddingGraph, VisionGraph, check_graph, plain
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.models.vision.base import VISION


def model(llm: str = "tinyllama", vision: str = "siglip", connector: str = "mlp") -> LMM:
    config = ModelConfig(
        llm=LLMConfig(type=llm, config=CONFIGS[llm]),
        vision=VisionConfig(type=vision, **VISION.get(vision).tiny()),
        connector=ConnectorConfig(type=connector, options=CONNECTORS.get(connector).tiny()),
    )
    lmm = build_model(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in lmm.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return lmm


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_padded_batch_in_parts_has_the_logits_of_the_model(family) -> None:
    lmm = model(family)
    graph, embedding = DecoderGraph(lmm, lmm.vocab_size - 3), EmbeddingGraph(lmm, lmm.vocab_size)
    ids = torch.randint(lmm.vocab_size, (2, 9), generator=torch.Generator().manual_seed(2))
    padding = [0, 3]
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    past, found = graph.no_past(2), []
    with plain():
        for start, stop in ((0, 5), (5, 6), (6, 9)):
            part = slice(start, stop)
            logits, *past = graph(embedding(ids[:, part]), mask[:, :stop], positions[:, part], *past)
            found.append(logits)
        for row, skipped in enumerate(padding):
            tokens = ids[row, skipped:]
            slots = torch.tensor([len(tokens)])
            embeds = lmm.embed(tokens, torch.zeros(1, lmm.hidden_size), slots)
            bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
            expected = lmm.logits(lmm.decode(embeds, torch.arange(len(tokens)), cu_seqlens=bounds))[:, :-3]
            torch.testing.assert_close(torch.cat(found, 1)[row, skipped:], expected, rtol=1e-3, atol=2e-4)
    check_graph(lmm, "a graph")


@pytest.mark.parametrize(
    ("vision", "connector"),
    [(name, "mlp") for name in sorted(VISION)]
    + [("siglip", name) for name in ("qformer", "resampler", "pixel_shuffle")],
)
def test_pixels_become_the_rows_that_enter_the_decoder(vision, connector) -> None:
    lmm = model("gemma", vision, "mof_mlp" if vision == "mof" else connector)
    pixels = torch.randn(2, 3, lmm.image_size, lmm.image_size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = lmm.scale_embeddings(lmm.encode_images(pixels))
    with plain():
        exported = torch.export.export(VisionGraph(lmm), (pixels,))
        torch.testing.assert_close(exported.module()(pixels), expected, rtol=1e-4, atol=1e-4)
    assert not [node for node in exported.graph.nodes if str(node.target).startswith("tlf")]


def test_positions_that_depend_on_the_length_are_refused() -> None:
    config = tiny_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(UserError, match="rope_type: dynamic"):
        check_graph(build_model(dataclasses.replace(config)).eval(), "onnx")


def test_ids_past_the_embedding_have_rows_of_zeros() -> None:
    lmm = model()
    rows = EmbeddingGraph(lmm, lmm.vocab_size + 2)(torch.tensor([[0, lmm.vocab_size + 1]]))
    assert rows[0, 1].eq(0).all() and torch.equal(rows[0, 0], lmm.family.embedding(lmm.llm).weight[0])
