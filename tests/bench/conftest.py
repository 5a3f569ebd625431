"""A tiny model and tiny packs for the benchmark's own tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from tests.vectors import GOLDEN
from tinyllava_fast.bench.settings import SMOLLM2
from tinyllava_fast.config.load import to_dict
from tinyllava_fast.config.schema import ConnectorConfig, LLMConfig, ModelConfig, VisionConfig
from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.models.build import build_model
from tinyllava_fast.models.lmm import LMM

TOKENIZER = GOLDEN / "tokenizers" / "phi_bytebpe"
VOCABULARY = 97
TINY_MODEL = ModelConfig(
    llm=LLMConfig(
        config={
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
        }
    ),
    vision=VisionConfig(
        config={
            "image_size": 16,
            "patch_size": 8,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
        }
    ),
    connector=ConnectorConfig(type="mlp"),
)


class RecordingGate:
    """Stands in for Gate: lets every step run and keeps the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.facts: dict[str, object] = {}

    def ready(self, facts: dict[str, object]) -> None:
        self.facts = facts

    def begin(self) -> None:
        pass

    def end(self, loss: float) -> None:
        self.losses.append(loss)


def make_pack(lengths: list[int], tokens: int, k: int, seed: int) -> PackedBatch:
    """Samples of the given lengths, the image at position 1 of each, about a third of the later tokens supervised."""
    g = torch.Generator().manual_seed(seed)
    ids, labels, positions = torch.zeros(tokens, dtype=torch.int64), torch.full((tokens,), -100), torch.zeros(tokens)
    slots, bounds = [], [0]
    for n in lengths:
        start = bounds[-1]
        ids[start : start + n] = torch.randint(3, VOCABULARY - 9, (n,), generator=g)
        ids[start + 1 : start + 1 + k] = 0
        chosen = (torch.rand(n, generator=g) < 0.3) & (torch.arange(n) > k)
        labels[start : start + n - 1] = torch.where(chosen, ids[start : start + n], -100)[1:]
        positions[start : start + n] = torch.arange(n)
        slots.append(torch.arange(start + 1, start + 1 + k))
        bounds.append(start + n)
    rows = (labels != -100).nonzero().flatten()
    return PackedBatch(
        input_ids=ids,
        labels=labels,
        position_ids=positions.long(),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        prefix=torch.zeros(len(lengths), 2, dtype=torch.int32),
        image_slots=torch.cat(slots),
        supervised=torch.cat([rows, torch.full((tokens - len(rows),), tokens)]),
        pixel_values=torch.randn(len(lengths), 3, 16, 16, generator=g),
        num_supervised=len(rows),
        num_tokens=bounds[-1],
        num_samples=len(lengths),
    )


@pytest.fixture
def lmm() -> LMM:
    return build_model(TINY_MODEL, seed=0, dtype=torch.float32)


@pytest.fixture
def packs() -> list[PackedBatch]:
    """Three steps of eight samples of different lengths (budget 256, tail of different size)."""
    lengths = [[20, 31, 9, 14, 40, 12, 27, 33], [11, 8, 50, 22, 19, 36, 15, 29], [30, 30, 30, 30, 30, 30, 30, 30]]
    return [make_pack(row, 256, 4, seed) for seed, row in enumerate(lengths)]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A workload like the real one: tiny model with random weights, easy-VQA records filled in by the benchmark."""
    tree = yaml.safe_load(SMOLLM2.read_text())
    tree["model"] = to_dict(TINY_MODEL)
    llm = tree["model"]["llm"]
    llm["config"] = {k: v for k, v in llm["config"].items() if k != "vocab_size"} | {"max_position_embeddings": 2048}
    llm["tokenizer"] = str(TOKENIZER)
    tree["stages"][0]["optim"]["lr"] = 1e-3
    tree["engine"].update(dtype="float32", device="cpu", threads=1)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
