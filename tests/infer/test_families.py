"""The engine's greedy answers equal transformers' generate for every language model adapter."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.infer.test_engine import QUESTIONS, ask, generate
from tests.models.llm.families import CONFIGS, stock
from tests.tiny import make_engine, tiny_config
from tinyllava_fast.models.build import build_model
from tinyllava_fast.models.lmm import LMM

LARGER = {"vocab_size": 272, "hidden_size": 48, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}
CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 24, "query_pre_attn_scalar": 12, "final_logit_softcapping": 20.0},
    "qwen2": {"sliding_window": 24},
    "openelm": {"vocab_size": 272, "model_dim": 48, "max_context_length": 2048},
}


def make(name: str) -> LMM:
    """Weights large enough that answers depend on the prompt and the image."""
    changes = CHANGES[name] if name == "openelm" else LARGER | CHANGES.get(name, {})
    base = tiny_config()
    config = dataclasses.replace(base, llm=dataclasses.replace(base.llm, type=name, config=CONFIGS[name] | changes))
    lmm = build_model(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, p in lmm.named_parameters():
            if p.ndim > 1 and "vision" not in parameter_name:
                p.copy_(torch.randn(p.shape, generator=generator) * (1.5 / p.shape[-1] ** 0.5))
    return lmm


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_greedy_equals_generate(name: str, tokenizer: Any, images: list[Any]) -> None:
    lmm = make(name)
    engine = make_engine(lmm, tokenizer)
    assert engine.share_prefix == (name not in ("gemma2", "qwen2"))
    requests = [ask(q, image, new=4 + 2 * i) for i, q in enumerate(QUESTIONS[:3]) for image in (images[0], None)]
    plain = stock(lmm.llm)
    expected = [generate(plain, engine, r) for r in requests]
    assert [a.tokens for a in engine.answers(requests)] == expected
    assert len({tuple(e) for e in expected}) > 2


def test_every_stop_id_of_the_model_ends_an_answer(tokenizer: Any) -> None:
    lmm = make("tinyllama")
    free = make_engine(lmm, tokenizer).answers([ask("why", new=8)])[0]
    lmm.llm.config.eos_token_id = [7, free.tokens[3]]
    engine = make_engine(lmm, tokenizer)
    assert engine.eos == {2, 7, free.tokens[3]}
    (answer,) = engine.answers([ask("why", new=8)])
    assert answer.finish == "eos" and answer.tokens == free.tokens[: free.tokens.index(free.tokens[3]) + 1]
