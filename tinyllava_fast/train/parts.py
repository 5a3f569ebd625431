"""Checksums of the parts of a run's model, so that its files may move: a resumed run has the checkpoint's weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import sha256

import torch
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from tinyllava_fast.config.schema import ModelConfig
from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.models.build import build_model
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.train.checkpoint import TrainState

MODEL_FILES = frozenset(
    {"model.path", "model.llm.path", "model.llm.tokenizer", "model.vision.path", "model.connector.path"}
)
"""Keys that name files of the model: they may change between a checkpoint and its continuation, the content may not."""


def first_model(
    config: ModelConfig,
    state: TrainState,
    tokenizer: PreTrainedTokenizerBase,
    processor: BaseImageProcessor,
    *,
    seed: int,
    dtype: torch.dtype,
) -> LMM:
    """Return the model that the run begins with, and note in the state what it is.

    Raise CheckpointError if its files have moved since the checkpoint, and are not the same ones.
    """
    model = build_model(config, seed=seed, dtype=dtype)
    found = _digests(model, tokenizer, processor)
    moved = [c["key"] for c in state.changes if c["key"] in MODEL_FILES and c["step"] == state.step]
    if moved and (other := [part for part in found if state.parts.get(part) != found[part]]):
        raise CheckpointError(
            f"{' and '.join(dict.fromkeys(moved))}: may name another place of the same files, but the "
            f"{' and the '.join(other)} there is not what the checkpoint was trained with; give a copy of those files"
        )
    state.parts = found
    return model


def _digests(model: LMM, tokenizer: PreTrainedTokenizerBase, processor: BaseImageProcessor) -> dict[str, str]:
    """Return a checksum of each part that no checkpoint holds."""
    words = {
        "ids": getattr(tokenizer, "backend_tokenizer").to_str(),  # noqa: B009 only fast tokenizers get here
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
    }
    parts = {
        "architecture": [asdict(part) for part in (model.config.llm, model.config.vision, model.config.connector)],
        "tokenizer": words,
        "image processor": processor.to_dict(),
    }
    return {
        name: sha256(json.dumps(part, sort_keys=True, default=str).encode()).hexdigest() for name, part in parts.items()
    }
