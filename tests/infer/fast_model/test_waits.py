"""A step of decoding holds no operator that waits for the GPU, so that a CUDA graph can record it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny import make_model
from tests.waits import Operators, ops_are_opaque
from tinyllava_fast.infer.fast_model.graph_step import GraphStep
from tinyllava_fast.infer.fast_model.prepare import PreparedModel, prepare_model
from tinyllava_fast.infer.fast_model.runner import PackedDecoder

__all__ = ["ops_are_opaque"]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "made ready": {},
    "windowed": {"model_type": "mistral", "sliding_window": 20},
    "phi": {"model_type": "phi"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}


@pytest.mark.usefixtures("ops_are_opaque")
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_waits_for_nothing(kind: str) -> None:
    lmm = make_model(**MODELS[kind])
    model = prepare_model(lmm) if kind == "made ready" else PreparedModel(lmm)
    lmm.to("meta")
    with torch.inference_mode():
        decoder = PackedDecoder(model, 256, share_prefix=kind != "windowed", compile=False)
        decoder.use_graphs(model, capture=False)
        assert isinstance(decoder.graphs, GraphStep)
        for order in (False, True):
            with Operators("meta") as operators:
                found, logits = decoder.graphs.compute((4, order, 270))
            assert found.shape == (4,) and logits.shape == (4, 270) and found.is_meta
            assert not operators.waiting
            for name in ("decode_attention_fwd", "draw_tokens", "index_copy_"):
                assert any(name in called for called in operators.called)


def test_waiting_operators_are_noticed() -> None:
    x = torch.randn(3)
    with Operators("cpu") as operators:
        x[x > 0]
        x.sum().item()
        x[torch.tensor([1])]
        torch.equal(x, x)
    assert operators.waiting == ["index.Tensor", "_local_scalar_dense.default", "equal.default"]
    meta = torch.empty(3, device="meta")
    for waits in (lambda: meta.sum().item(), lambda: meta.cpu(), lambda: meta[meta > 0]):
        with Operators("meta") as operators, pytest.raises((RuntimeError, NotImplementedError)):
            waits()
