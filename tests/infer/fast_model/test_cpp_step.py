"""What a step computes is held against the layers in test_fused_step.py; here: what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinyllava_fast.infer.fast_model.cpp_step import Product, StepLayer, StepPlan
from tinyllava_fast.ops import quantize_int8, quantize_nf4

D, H, KV, SIZE, INNER, POOL, VOCAB = 12, 2, 1, 4, 10, 6, 9


def layer(**changes: object) -> StepLayer:
    w = torch.ones
    products = [Product(w(*s)) for s in (((H + 2 * KV) * SIZE, D), (D, H * SIZE), (2 * INNER, D), (D, INNER))]
    return StepLayer(w(D), w(D), *products, w(POOL, KV, SIZE), w(POOL, KV, SIZE))._replace(**changes)


def plan(*layers: StepLayer, embedding: object = None, norm: torch.Tensor | None = None) -> StepPlan:
    table = torch.ones(VOCAB, D) if embedding is None else embedding
    last = torch.ones(D) if norm is None else norm
    return StepPlan(layers or [layer()], table, last, heads=H, eps=1e-5, scale=0.5)


def tokens(*values: tuple[int, int, int, int, int]) -> np.ndarray:
    return np.array(values, dtype=np.int64).reshape(-1, 5)


def test_tokens_out_of_range_change_nothing() -> None:
    first = layer()
    step = plan(first)
    with pytest.raises(ValueError, match="position 0 of 0"):
        step(tokens((0, 0, 0, 0, 0)))
    step.turn(torch.ones(4, SIZE), torch.zeros(4, SIZE))
    good = (1, 2, 3, 0, 0)
    for bad in ((9, 0, 0, 0, 0), (-1, 0, 0, 0, 0), (1, 5, 1, 0, 0), (1, 0, 0, 4, 3), (1, 0, 2, 0, 2), (1, 0, -1, 0, 0)):
        with pytest.raises(ValueError, match="decode_step: token 1: id"):
            step(tokens(good, bad))
    assert bool((first.k == 1).all())
    assert step(tokens(good)).shape == (1, D) and not bool((first.k == 1).all())
    assert step(tokens()).shape == (0, D)
    with pytest.raises(ValueError, match=r"contiguous int64 \[R, 5\]"):
        step(tokens(good)[:, :4])


def test_an_int8_embedding_is_its_rows() -> None:
    table = quantize_int8(torch.randn(VOCAB, D, generator=torch.Generator().manual_seed(0)))
    results = []
    for embedding in (table, table.values.float() * table.scale[:, None]):
        step = plan(embedding=embedding)
        step.turn(torch.ones(4, SIZE), torch.zeros(4, SIZE))
        results.append(step(tokens((3, 0, 1, 0, 0), (8, 3, 0, 0, 0))))
    assert torch.equal(*results)


def test_refusals() -> None:
    ones = torch.ones
    cases = [
        (layer(post_norm=ones(D - 1)), "norm has 11 entries"),
        (layer(q_norm=ones(D)), "norm has 12 entries, expected 4"),
        (layer(o=Product(ones(D, D))), r"o is \[12, 12\], expected \[12, 8\]"),
        (layer(down=Product(ones(INNER, D).t())), r"down is .* without gaps"),
        (layer(gate_up=Product(ones(2 * INNER, D).bfloat16())), "gate_up must be float32"),
        (layer(qkv=Product(quantize_nf4(ones(8, D)))), r"qkv is \[8, 12\], expected \[16, 12\]"),
        (layer(qkv=Product(ones(16, D), ones(3))), r"qkv\.bias has 3 entries"),
        (layer(v=ones(POOL, KV, SIZE + 2)), r"v is .* expected"),
    ]
    for bad, said in cases:
        with pytest.raises(ValueError, match=f"decode_step: {said}"):
            plan(layer(), bad)
    with pytest.raises(ValueError, match=r"float32 or bfloat16, got torch.float64"):
        plan(norm=ones(D, dtype=torch.float64))
    with pytest.raises(ValueError, match="sine is"):
        plan().turn(ones(4, SIZE), ones(3, SIZE))
