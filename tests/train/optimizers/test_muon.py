"""Muon: orthogonal updates of matrices, AdamW's of the rest, resumed bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tinyllava_fast.config.load import load_run
from tinyllava_fast.train.loop import train
from tinyllava_fast.train.optimizers.base import OptimizerSettings
from tinyllava_fast.train.optimizers.muon import Muon


def test_a_matrix_moves_by_an_orthogonal_one_and_a_vector_as_adamw_moves_it() -> None:
    g = torch.Generator().manual_seed(0)
    matrix, vector, embedding = (torch.randn(shape, generator=g) for shape in ((24, 16), (16,), (30, 16)))
    before = [tensor.clone() for tensor in (matrix, vector, embedding)]
    groups: Any = [{"name": "llm", "params": [matrix, vector, embedding], "lr": 0.1, "weight_decay": 0.0}]
    optimizer = Muon(groups, OptimizerSettings(betas=(0.9, 0.99), eps=1e-8, exact=frozenset({embedding})))
    gradients = {p: torch.randn(p.shape, generator=g) for p in (matrix, vector, embedding)}
    signs = [gradients[p].sign() for p in (vector, embedding)]
    optimizer.steps = 1
    optimizer.step(gradients, torch.tensor(5.0), 1.0)
    singular = torch.linalg.svdvals(before[0] - matrix) / (0.1 * 0.2 * 24**0.5)
    assert singular.max() < 1.3 and singular.min() > 0.6, "match_rms_adamw: 0.2 sqrt(24) times an orthogonal matrix"
    for p, was, sign in zip((vector, embedding), before[1:], signs, strict=True):
        torch.testing.assert_close(was - p, 0.1 * sign, rtol=1e-4, atol=1e-4)
    assert set(optimizer.state(matrix)) == {"momentum_buffer"}
    assert set(optimizer.state(embedding)) == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns_and_resumes_bit_for_bit(tiny_run: Callable[..., Path], losses: Any, dtype: str) -> None:
    optim = {"type": "muon", "lr": 5e-3, "weight_decay": 0.01, "options": {"steps": 4}}
    path = tiny_run(engine__dtype=dtype, stages__finetune__optim=optim)
    train(load_run(path))
    run = path.parent / "run"
    lines = losses(run)
    assert lines[-1][2] < lines[4][2] - 0.2
    last = run / "checkpoints" / "finetune-00000012"
    with safe_open(last / "optimizer.safetensors", "pt") as tensors:
        kinds = {name.partition("/")[0] for name in tensors.keys()}
    kept = {"step", "momentum_buffer", "exp_avg", "exp_avg_sq"}
    assert kinds == kept | ({"master"} if dtype == "bfloat16" else set())
    shutil.rmtree(last)
    train(load_run(path))
    assert losses(run) == lines
