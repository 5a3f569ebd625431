"""The tiny config of every language model family, and its model beside transformers' own run of it."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tinyllava_fast.models.llm.base import LLMS, LLMFamily

WINDOW = 3  # of the tiny models that have one
CONFIGS = {name: LLMS.get(name).tiny() for name in LLMS}


def build(name: str, *, seed: int = 3, **changes: object) -> tuple[LLMFamily, PreTrainedModel]:
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
