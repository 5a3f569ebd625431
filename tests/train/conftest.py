"""A whole run in a temporary folder: records, images, tokenizer, configuration; tiny, seeded, on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.log import log, setup_logging

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "grey": (128, 128, 128)}
LLAMA = tiny.LLAMA | {"tie_word_embeddings": True}
SIGLIP = tiny.IMAGE


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE with few merges; <unk> 0, <s> 1, </s> 2, <pad> 3."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    text = TEMPLATES.get("llama").render([("what colour is it ?", name) for name in COLOURS], None).text
    backend.train_from_iterator([*text.split("</s>"), "say hello ."] * 2, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


def write_records(folder: Path, count: int) -> Path:
    """Every fourth record has no image, every third asks twice."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    records = []
    for i in range(count):
        name, rgb = list(COLOURS.items())[int(rng.integers(len(COLOURS)))]
        turns = [("what colour is it ?", name)] * (2 if i % 3 == 0 else 1)
        record: dict[str, Any] = {"id": f"r{i}"}
        if i % 4 == 3:
            turns = [("say hello .", "hello .")]
        else:
            pixels = np.full((16, 16, 3), rgb, np.uint8) + rng.integers(0, 20, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
            record["image"] = f"{i}.png"
        record["conversations"] = []
        for j, (question, answer) in enumerate(turns):
            marker = "<image>\n" if j == 0 and "image" in record else ""
            record["conversations"] += [
                {"from": "human", "value": marker + question},
                {"from": "gpt", "value": answer},
            ]
        records.append(record)
    path = folder / "records.json"
    path.write_text(json.dumps(records))
    return path


def prepare(folder: Path, *, records: int = 40, **changes: Any) -> Path:
    """Write everything and return the YAML; changes: dotted keys, with ``__`` for a dot (engine__dtype="bfloat16")."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / "tokenizer")
    data = {"records": str(write_records(folder, records)), "image_folder": str(folder / "images")}
    batch = {"tokens": 96, "max_segments": 8, "max_images": 4, "packs_per_step": 2, "lookahead": 16}
    optim = {"lr": 3e-3, "warmup_ratio": 0.1, "weight_decay": 0.01}
    run = {
        "output_dir": str(folder / "run"),
        "model": {
            "llm": {"config": LLAMA, "tokenizer": str(folder / "tokenizer")},
            "vision": {"config": SIGLIP},
        },
        "stages": [
            {
                "name": "pretrain",
                "data": {**data, "template": "llama"},
                "recipe": {"llm": {"tune": "frozen"}},
                "optim": optim,
                "batch": batch,
                "max_steps": 4,
            },
            {
                "name": "finetune",
                "data": {**data, "template": "llama"},
                "recipe": {"vision": {"tune": "full", "lr": 1e-3}},
                "optim": optim,
                "batch": batch,
                "max_steps": 8,
            },
        ],
        "engine": {"dtype": "float32", "workers": 0, "threads": 1, "device": "cpu"},
        "checkpoint": {"every_steps": 3, "keep": 2},
        "log_every": 1,
    }
    for key, value in changes.items():
        node: Any = run
        *parents, last = key.split("__")
        for part in parents:
            node = node.setdefault(part, {}) if isinstance(node, dict) else _stage(node, part)
        node[last] = value
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def _stage(stages: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(s for s in stages if s["name"] == name)


@pytest.fixture(autouse=True)
def _log_reaches_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    setup_logging()
    monkeypatch.setattr(log, "propagate", True)


@pytest.fixture
def tiny_run(tmp_path: Path) -> Callable[..., Path]:
    """prepare() in the test's own folder."""
    return lambda **changes: prepare(tmp_path, **changes)


@pytest.fixture
def losses() -> Callable[[Path], list[tuple[int, str, float]]]:
    """(step, stage, loss) of a run folder's metrics.jsonl."""

    def read(run: Path) -> list[tuple[int, str, float]]:
        entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [(e["step"], e["stage"], e["loss"]) for e in entries]

    return read
