"""Tiny configurations; a tiny seeded model whose greedy answers vary, its tokenizer, and an engine around them."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tinyllava_fast.config.schema import ConnectorConfig, LLMConfig, ModelConfig, VisionConfig
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.fast_model.prepare import PreparedModel
from tinyllava_fast.models.build import build_image_processor, build_model
from tinyllava_fast.models.lmm import LMM

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
LLAMA = {"model_type": "llama", **TEXT}
IMAGE = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 8,
}
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level without merges: 260 ids, every text can be encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def tiny_config(**llm: object) -> ModelConfig:
    text = {
        **LLAMA,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "vocab_size": 272,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **llm,
    }
    vision = IMAGE | {"hidden_size": 32, "intermediate_size": 64, "image_size": 32}
    return ModelConfig(
        llm=LLMConfig(config=text),
        vision=VisionConfig(config=vision, feature_layer=-1),
        connector=ConnectorConfig(type="mlp"),
    )


def make_model(seed: int = 0, **llm: object) -> LMM:
    """Weights large enough that answers depend on prompt and image; a raised logit makes </s> come up now and then."""
    lmm = build_model(tiny_config(**llm), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in lmm.named_parameters():
            if p.ndim > 1 and "vision" not in name:
                p.copy_(torch.randn(p.shape, generator=generator) * (1.5 / p.shape[-1] ** 0.5))
        lmm.llm.lm_head.weight[2] *= 1.4
    return lmm


def make_engine(model: LMM | PreparedModel, tokenizer: PreTrainedTokenizerFast, **options: object) -> Engine:
    processor = build_image_processor(tiny_config())
    options = {"batch_tokens": 4096, "prefill_tokens": 1024, **options}
    return Engine(model, tokenizer, processor, TEMPLATES.get("llama"), **options)
