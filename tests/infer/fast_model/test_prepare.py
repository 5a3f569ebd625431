"""Dense weights decode to the same answers, quantized ones to close logits, and each weight is held once."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

import tinyllava_fast
from tests.tiny import make_engine, make_model
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.fast_model.decoder_layer import DecodeLayer
from tinyllava_fast.infer.fast_model.linear import DecodeLinear
from tinyllava_fast.infer.fast_model.prepare import PreparedModel, prepare_model
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.ops.linear import dense_weight
from tinyllava_fast.recipes.linears import linears

QUESTIONS = [f"question {i}?" for i in range(18)]


def hidden_and_logits(model: PreparedModel, rows: int) -> torch.Tensor:
    lmm = model.lmm
    embeds = torch.randn(rows, lmm.hidden_size, generator=torch.Generator().manual_seed(1))
    cu = torch.tensor([0, rows], dtype=torch.int32)
    with torch.inference_mode():
        return model.logits(lmm.decode(embeds, torch.arange(rows), cu_seqlens=cu))


FAMILIES = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "phi": {"model_type": "phi", "num_key_value_heads": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_answers_are_the_same(family, tokenizer, images):
    requests = [
        Request.ask(q, images[i % 4], sampling=Sampling(max_new_tokens=4 + i % 5)) for i, q in enumerate(QUESTIONS)
    ]
    expected = make_engine(make_model(**FAMILIES[family]), tokenizer).answers(requests)
    lmm = make_model(**FAMILIES[family])
    model = prepare_model(lmm)
    assert model.ready
    assert [a.tokens for a in make_engine(model, tokenizer).answers(requests)] == [a.tokens for a in expected]
    assert (lmm.family.head(lmm.llm)[0] is lmm.family.embedding(lmm.llm).weight) == (family == "tied")
    fused = sum(isinstance(m, DecodeLayer) for m in lmm.llm.modules())
    assert fused == (0 if family == "phi" else lmm.num_layers)


def dequantized(model: PreparedModel) -> PreparedModel:
    """The stock model with what a prepared one multiplies by."""
    plain = make_model()
    for layer, ours in zip(plain.llm.model.layers, model.lmm.llm.model.layers, strict=True):
        attn, mlp = layer.self_attn, layer.mlp
        products = ((ours.qkv, [attn.q_proj, attn.k_proj, attn.v_proj]), (ours.o, [attn.o_proj]))
        for fused, stock in (*products, (ours.gate_up, [mlp.gate_proj, mlp.up_proj]), (ours.down, [mlp.down_proj])):
            parts = dense_weight(fused.held, torch.float32).split([s.out_features for s in stock])
            for linear, part in zip(stock, parts, strict=True):
                linear.weight.data = part
    plain.llm.lm_head.weight.data = dense_weight(model._head.held, torch.float32)
    return PreparedModel(plain)


@pytest.mark.parametrize(("weights", "most"), [("int8", 0.05), ("nf4", 0.7)])
@pytest.mark.parametrize("rows", [3, 40])
def test_quantized_logits_are_those_of_the_rounded_weights(weights, most, rows):
    exact = hidden_and_logits(PreparedModel(make_model()), rows)
    model = prepare_model(make_model(), weights)
    got = hidden_and_logits(model, rows)
    torch.testing.assert_close(got, hidden_and_logits(dequantized(model), rows), atol=1e-3, rtol=1e-3)
    assert 0 < (got - exact).norm() / exact.norm() < most


def storage_bytes(model: PreparedModel) -> int:
    llm, head = model.lmm.llm, model._head
    tensors = [*llm.parameters(), *llm.buffers()]
    if isinstance(head, nn.Module):
        tensors += [*head.parameters(), *head.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values())


@pytest.mark.parametrize(("weights", "share"), [("int8", 1 / 4), ("nf4", 1 / 8 + 1 / 64)])
@pytest.mark.parametrize("tied", [False, True])
def test_each_weight_is_held_once(weights, share, tied):
    lmm = make_model(tie_word_embeddings=tied)
    before = storage_bytes(PreparedModel(lmm))
    layers = [linear.weight for _, linear in linears(lmm, "llm")]
    head = lmm.family.head(lmm.llm)[0].numel()
    products = sum(w.numel() for w in layers)
    gone = [weakref.ref(w) for w in layers]
    outputs = sum(len(w) for w in layers)
    del layers
    model = prepare_model(lmm, weights)
    assert all(ref() is None for ref in gone)
    kept = before - 4 * products - (0 if tied else 4 * head)
    scales = 4 * (outputs + lmm.vocab_size)
    assert storage_bytes(model) <= kept + 4 * products * share + head + scales
    assert sum(isinstance(m, DecodeLinear) for m in lmm.llm.modules()) == 4 * lmm.num_layers


def test_loading(folder, images):
    for weights in ("bf16", "int8", "nf4"):
        assistant = tinyllava_fast.load(folder, device="cpu", weights=weights)
        assert isinstance(assistant.answer(images[0], "What is this?", max_new_tokens=3), str)
        assert (assistant.engine.lmm.dtype == torch.bfloat16) == (weights == "bf16")
    with pytest.raises(UserError, match="unknown weights 'nf5'; did you mean 'nf4'"):
        tinyllava_fast.load(folder, weights="nf5")
    with pytest.raises(UserError, match="leave one of them out"):
        tinyllava_fast.load(folder, weights="bf16", dtype="float32")
    with pytest.raises(UserError, match="float16; load it with"):
        tinyllava_fast.load(folder, device="cpu", weights="int8", dtype="float16")
