"""A tiny config of every language model adapter, and its model beside transformers' own run of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.tiny import TEXT
from tinyllava_fast.models.llm.base import LLMS, LLMFamily

BASE = TEXT | {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
WINDOW = 3
CONFIGS: dict[str, dict[str, Any]] = {
    "auto": {**BASE, "model_type": "smollm3", "no_rope_layers": [1, 0]},
    "gemma": {**BASE, "head_dim": 8},
    "gemma2": {
        **BASE,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
    },
    "openelm": {
        "model_dim": 32,
        "num_transformer_layers": 3,
        "head_dim": 8,
        "num_gqa_groups": 2,
        "qkv_multipliers": [0.5, 1.5],
        "ffn_multipliers": [0.5, 2.0],
        "ffn_dim_divisor": 8,
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
        "vocab_size": 61,
    },
    "phi": {**BASE, "resid_pdrop": 0.0},
    "qwen2": {**BASE, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {**BASE, "head_dim": 16},
    "smollm2": {**BASE, "tie_word_embeddings": True},
    "stablelm": {**BASE, "use_qkv_bias": True, "qk_layernorm": True, "partial_rotary_factor": 0.5},
    "tinyllama": BASE,
}


def build(name: str, *, seed: int = 3, **changes: Any) -> tuple[LLMFamily, PreTrainedModel]:
    """The adapter and a seeded float32 model, with norms and biases that are not their neutral values."""
    adapter = LLMS.get(name)()
    llm = adapter.from_config(CONFIGS[name] | changes, seed=seed, where="model.llm")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in llm.parameters():
            scale = 0.1 if parameter.ndim == 1 else 1.5 / parameter.shape[-1] ** 0.5
            fresh = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(fresh if parameter.ndim > 1 else parameter + fresh)
    return adapter, llm


def stock(llm: PreTrainedModel) -> PreTrainedModel:
    """transformers' own class with the same weights, its eager attention, in eval mode."""
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(llm.config), attn_implementation="eager")
    assert llm.config._attn_implementation == "tlf_packed"
    plain.load_state_dict(llm.state_dict())
    return plain.eval()
