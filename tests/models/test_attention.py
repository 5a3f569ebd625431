"""Packed attention inside transformers' decoders equals each sequence alone with transformers' own attention."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny import TEXT
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.attention import KVView, full, packed
from tinyllava_fast.models.llm.auto import AutoLLM

BASE = TEXT | {"vocab_size": 61}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": BASE,
    "qwen2": BASE | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "phi": BASE | {"resid_pdrop": 0.0},
    "gemma": BASE | {"head_dim": 8},
    "gemma2": BASE | {"head_dim": 8, "sliding_window": 3, "attn_logit_softcapping": 2.0},
    "gemma3_text": BASE | {"head_dim": 8, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": BASE | {"sliding_window": 3},
    "olmo2": BASE,
    "phi3": BASE | {"pad_token_id": None, "sliding_window": 3},
    "qwen3": BASE | {"head_dim": 16},
    "smollm3": BASE | {"pad_token_id": 0, "no_rope_layers": [1, 0]},
}
LENGTHS = (5, 1, 7)


def build(family: str, **changes: object) -> PreTrainedModel:
    config = {"model_type": family, **FAMILIES[family], **changes}
    return AutoLLM().from_config(config, seed=3, where="model.llm")


def inputs(lengths: tuple[int, ...] = LENGTHS, spare: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Embeds [T, D], positions [T] and cu_seqlens of segments laid end to end."""
    total = sum(lengths) + spare
    embeds = torch.randn(total, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in (*lengths, spare)])
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return embeds, positions, bounds


def alone(llm: PreTrainedModel, embeds: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """Each sequence through transformers' eager attention, its own mask and positions."""
    plain = copy.deepcopy(llm)
    plain.set_attn_implementation("eager")
    return torch.cat(
        [plain.base_model(inputs_embeds=part[None]).last_hidden_state[0] for part in embeds.split(lengths)]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone(family: str) -> None:
    llm = build(family)
    embeds, positions, bounds = inputs()
    got = AutoLLM().hidden(llm, embeds[None], positions[None], cu_seqlens=bounds)[0, : sum(LENGTHS)]
    torch.testing.assert_close(got, alone(llm, embeds[: sum(LENGTHS)]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "gemma", "gemma2", "smollm3"])
def test_compiles_without_graph_breaks(family: str) -> None:
    llm, adapter = build(family), AutoLLM()
    embeds, positions, bounds = inputs()

    def loss(x: Tensor) -> Tensor:
        return adapter.hidden(llm, x[None], positions[None], cu_seqlens=bounds)[0, : sum(LENGTHS)].square().sum()

    eager, compiled = embeds.clone().requires_grad_(), embeds.clone().requires_grad_()
    loss(eager).backward()
    torch._dynamo.reset()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert eager.grad is not None and compiled.grad is not None
    torch.testing.assert_close(compiled.grad, eager.grad, atol=1e-5, rtol=1e-4)


def test_kv_pool_equals_one_pass() -> None:
    """Two sequences prefilled, then decoded token by token against a pool, out of order."""
    llm, adapter, lengths = build("llama"), AutoLLM(), (5, 7)
    embeds, _, _ = inputs(lengths, spare=0)
    want = alone(llm, embeds, lengths)
    pool = [torch.zeros(24, 2, 8) for _ in range(4)]
    starts = torch.tensor([12, 0, 24], dtype=torch.int32)  # first pool row of each sequence
    rows = [embeds[:5], embeds[5:]]

    def step(begin: int, end: list[int]) -> Tensor:
        counts = [e - begin for e in end]
        view = KVView(
            k=pool[:2],
            v=pool[2:],
            slots=torch.cat([starts[i] + torch.arange(begin, e) for i, e in enumerate(end)]).long(),
            cu_seqlens_q=torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32),
            cu_seqlens_k=starts,
            seqused_k=torch.tensor(end, dtype=torch.int32),
        )
        x = torch.cat([rows[i][begin:e] for i, e in enumerate(end)])
        positions = torch.cat([torch.arange(begin, e) for e in end])
        return adapter.hidden(llm, x[None], positions[None], kv=view)[0]

    with torch.no_grad():
        first = step(0, [3, 3])
        later = [step(t, [t + 1, t + 1]) for t in range(3, 5)]
    got = torch.cat([first[:3], *[x[:1] for x in later], first[3:], *[x[1:] for x in later]])
    torch.testing.assert_close(got, torch.cat([want[:5], want[5:10]]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_is_bidirectional_per_image(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(1), dtype=dtype).unbind(0)
    out, weights = full(torch.nn.Module(), q, k, v, None, scaling=0.3)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2)
    assert weights is None
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="dropout or a mask"):
        full(torch.nn.Module(), q, k, v, None, dropout=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "neither cu_seqlens nor kv.*family of its own"),
        ({"dropout": 0.1}, "attention dropout 0.1; set attention_dropout: 0"),
        ({"attention_mask": torch.ones(1)}, "segments are given by cu_seqlens"),
        ({"s_aux": torch.ones(1)}, "attention sinks"),
    ],
)
def test_refuses_by_name(change: dict[str, object], message: str) -> None:
    q = torch.zeros(1, 2, 3, 4)
    keywords = {"attention_mask": None, **change}
    with pytest.raises(ValueError, match=message):
        packed(torch.nn.Linear(1, 1), q, q, q, **keywords)


def test_refuses_a_window_with_prefixes() -> None:
    embeds, positions, bounds = inputs()
    prefix = torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"last 3 tokens, .*turns=conversation, or batch\.tokens to at most 3"):
        AutoLLM().hidden(build("qwen2"), embeds[None], positions[None], cu_seqlens=bounds, prefix=prefix)
    got = AutoLLM().hidden(build("llama"), embeds[None], positions[None], cu_seqlens=bounds, prefix=prefix)
    assert got.isfinite().all()


def test_a_decoder_that_drops_the_arguments_is_named() -> None:
    llm = AutoLLM().from_config({"model_type": "stablelm", **BASE}, seed=0, where="model.llm")
    embeds, positions, bounds = inputs()
    with pytest.raises(ValueError, match=r"StableLmAttention passed neither .* needs a family of its own"):
        AutoLLM().hidden(llm, embeds[None], positions[None], cu_seqlens=bounds)


def test_refuses_a_batch() -> None:
    q = torch.zeros(2, 2, 3, 4)
    with pytest.raises(ValueError, match="batch of 2"):
        packed(torch.nn.Linear(1, 1), q, q, q, None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "cohere", **BASE, "logit_scale": 0.5},
            "cohere has logit_scale=0.5, which linear",
        ),
        ({"model_type": "granite", **BASE, "logits_scaling": 2.0}, "granite has logits_scaling=2.0"),
        ({"model_type": "llama", **BASE, "attention_dropout": 0.1}, "set model.llm.config.attention_dropout: 0"),
        ({"model_type": "lama", **BASE}, "did you mean 'llama'"),
        ({"model_type": "llama", "hidden_siz": 3}, "hidden_siz: not a key of LlamaConfig; did you mean 'hidden_size'"),
        ({"model_type": "siglip_vision_model"}, "not usable as a language model"),
        ({"model_type": "mamba"}, "not a decoder of attention layers"),
        ({"model_type": "llama", **BASE, "hidden_size": 33}, "transformers refuses this llama config"),
        ({"model_type": "llama", **BASE, "hidden_act": "nope"}, r"config: this llama is not usable .*KeyError: 'nope'"),
        ({"model_type": "llama", **BASE, "pad_token_id": 1000}, "config: this llama is not usable .*Padding_idx"),
        ({"model_type": "llama", **BASE, "num_key_value_heads": 3}, "num_key_value_heads: 3 do not divide"),
        (
            {"model_type": "llama", **BASE, "num_attention_heads": 0},
            "config.num_attention_heads: expected a whole number",
        ),
        ({"model_type": "gpt2", "n_head": 0}, "config.n_head: expected a whole number from 1 to .*, got 0"),
        ({"model_type": "gpt2", "n_embd": -8}, "config.n_embd: expected a whole number from 1 to .*, got -8"),
        ({"model_type": "llama", **BASE, "hidden_size": "32"}, "hidden_size"),
        ({"model_type": "llama", **BASE, "vocab_size": 10**12}, "config.vocab_size: expected .* to 16777216"),
        (
            {"model_type": "llama", **BASE, "attention_dropout": -1},
            "attention_dropout: expected a number of at least 0",
        ),
        (
            {"model_type": "llama", **BASE, "initializer_range": -1},
            "initializer_range: expected a number of at least 0",
        ),
        ({"model_type": "llama", **BASE, "rms_norm_eps": -1}, "rms_norm_eps: expected a number of at least 0, got -1"),
        ({"model_type": "llama", **BASE, "rope_theta": 0}, "rope_theta: expected a number above 0, got 0"),
    ],
)
def test_config_errors(config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AutoLLM().from_config(config, seed=0, where="model.llm")
