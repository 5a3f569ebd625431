"""The registry of optimizers: an unknown name, and one from a plugin, which trains, saves and goes on bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.examples import write_example
from tinyllava_fast.config.load import load_run
from tinyllava_fast.config.schema import EngineConfig, OptimConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.plugins import load_plugins
from tinyllava_fast.train import cli
from tinyllava_fast.train.loop import train
from tinyllava_fast.train.optimizers.base import OPTIMIZERS, check_optimizer

NAMES = ["adamw", "adamw8bit", "lion", "lion8bit", "muon", "paged_adamw", "paged_adamw8bit", "paged_lion8bit"]
Losses = Callable[[Path], list[tuple[int, str, float]]]


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The optimizer of docs/plugins.md; what it registers is forgotten after the test."""
    monkeypatch.setattr(OPTIMIZERS, "_entries", {name: OPTIMIZERS.get(name) for name in OPTIMIZERS})
    return write_example(tmp_path, "signum.py")


def test_the_package_has_these() -> None:
    assert OPTIMIZERS.names() == NAMES


def test_an_unknown_name_is_refused_with_file_key_and_names(
    tiny_run: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny_run(stages__finetune__optim={"type": "adamw_8bit"})
    assert cli.main([str(path)]) == 2
    said = f"{path}: stages.finetune.optim.type: unknown optimizer 'adamw_8bit'; did you mean 'adamw8bit'? Known: "
    assert said + ", ".join(NAMES) in caplog.text
    assert not (path.parent / "run").exists()


def test_an_unknown_option_is_refused(tiny_run: Callable[..., Path]) -> None:
    path = tiny_run(stages__finetune__optim={"options": {"bits": 8}})
    with pytest.raises(
        UserError, match=r"^run.yaml: stages\.finetune\.optim\.options\.bits: unknown key; Known: \(none"
    ):
        train(load_run(path), file="run.yaml")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_optimizer_of_a_plugin_resumes_bit_for_bit(
    tiny_run: Callable[..., Path], losses: Losses, plugin: Path, dtype: str
) -> None:
    optim = {"type": "signum", "lr": 1e-3, "options": {"momentum": 0.8}}
    path = tiny_run(plugins=[str(plugin)], engine__dtype=dtype, stages__finetune__optim=optim)
    train(load_run(path))
    run = path.parent / "run"
    lines = losses(run)
    last = run / "checkpoints" / "finetune-00000012"
    with safe_open(last / "optimizer.safetensors", "pt") as tensors:
        kinds = {name.partition("/")[0] for name in tensors.keys()}
    assert kinds == {"step", "momentum"} | ({"master"} if dtype == "bfloat16" else set())
    shutil.rmtree(last)
    train(load_run(path))
    assert losses(run) == lines


def test_an_optimizer_of_a_plugin_has_no_zero(plugin: Path) -> None:
    load_plugins([str(plugin)])
    engine = EngineConfig(type="deepspeed", zero_stage=1)
    with pytest.raises(
        UserError, match=r"stages\.x\.optim\.type: signum with engine\.zero_stage: 1, .*set zero_stage: 0"
    ):
        check_optimizer(OptimConfig(type="signum"), engine, torch.device("cpu"), "stages.x")
