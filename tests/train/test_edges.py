"""The first and the last value that a range allows train: no number of the schema is allowed that a run breaks on."""

from __future__ import annotations

import pytest

from tinyllava_fast.config.load import load_run
from tinyllava_fast.train.loop import train

LOW = {
    "seed": 0,
    "log_every": 1,
    "checkpoint": "{every_steps: 0, keep: 1}",
    "engine.threads": 0,
    "engine.prefetch": 1,
    "model.vision.image_mean": "[0, 0, 0]",
    "stages.finetune.epochs": 1e-6,
    "stages.finetune.max_steps": "null",
    "stages.finetune.data.max_tokens": 96,
    "stages.finetune.data.augment": "{hflip: 0, vflip: 0, shift: 0, scale: 0, rotate: 0}",
    "stages.finetune.batch": "{tokens: 96, max_segments: 4, max_images: 1, image_multiple: 1, lookahead: 1}",
    "stages.finetune.optim": "{lr: 1e-12, betas: [0, 0], eps: 1e-30, clip_norm: 0, weight_decay: 0, warmup_ratio: 0}",
    "stages.finetune.recipe.llm": "{tune: lora, lora: {r: 1, alpha: 1e-6, dropout: 0}}",
}
HIGH = {
    "seed": 2**32 - 1,
    "log_every": 2**31 - 1,
    "checkpoint": "{every_steps: 2147483647, keep: 2147483647}",
    "model.vision.image_mean": "[1, 1, 1]",
    "model.vision.image_std": "[1000, 1000, 1000]",
    "stages.finetune.max_steps": 1,
    "stages.finetune.data.max_tokens": 2**31 - 1,
    "stages.finetune.data.augment": "{hflip: 1, vflip: 1, shift: 1, scale: 0.999, rotate: 180}",
    "stages.finetune.batch": "{tokens: 4096, max_segments: 65536, max_images: 2147483647, lookahead: 2147483647}",
    "stages.finetune.optim": "{lr: 1, betas: [0.999, 0.9999], eps: 1, clip_norm: 1e30, weight_decay: 1, "
    "warmup_ratio: 1, min_lr_ratio: 1, label_smoothing: 1, z_loss: 1}",
    "stages.finetune.recipe.llm": "{tune: lora, lora: {r: 64, alpha: 1000, dropout: 0.99}}",
}


@pytest.mark.parametrize("edges", [LOW, HIGH], ids=["low", "high"])
def test_edges_train(edges: dict[str, object], tiny_run) -> None:
    path = tiny_run(records=8)
    stages = ["stages.pretrain.max_steps=1"]
    summary = train(load_run(path, [*stages, *(f"{key}={value}" for key, value in edges.items())]))
    assert summary["steps"] == 2
    assert (path.parent / "run" / "final" / "model.safetensors").is_file()
