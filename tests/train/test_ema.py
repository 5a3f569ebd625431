"""optim.ema: the mean of the weights, what is done with it, and that training does not notice."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.test_validation import validations
from tinyllava_fast.config.load import load_run
from tinyllava_fast.config.schema import OptimConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.train.loop import train
from tinyllava_fast.train.optim import MasterOptimizer
from tinyllava_fast.train.optimizers.base import check_optimizer

TinyRun = Callable[..., Path]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_follows_its_formula_and_weights_come_back(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 4, generator=g).to(dtype))
    groups: Any = [{"name": "llm", "params": [weight], "lr": 0.1, "weight_decay": 0.0}]
    optimizer = MasterOptimizer(groups, {weight: "w"}, OptimConfig(ema=0.9))
    mean = weight.detach().float().clone()
    for step in range(1, 31):
        weight.grad = torch.randn(8, 4, generator=g).to(dtype)
        optimizer.accumulate()
        optimizer.step({"llm": 0.1})
        state = {item.name: item.fetch() for item in optimizer.state()}
        decay = min(0.9, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * state.get("master/w", weight.detach()).float()
    torch.testing.assert_close(state["ema/w"], mean, rtol=1e-5, atol=1e-6)
    before = weight.detach().clone()
    with optimizer.averaged():
        torch.testing.assert_close(weight.detach().float(), mean, rtol=1e-2, atol=1e-2)
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_does_not_notice_and_the_folder_holds_the_mean(tiny_run: TinyRun, losses: Any, dtype: str) -> None:
    path = tiny_run(engine__dtype=dtype, stages__finetune__validation={"share": 0.3, "every_steps": 4, "samples": 1})
    plain, averaged = path.parent / "plain", path.parent / "averaged"
    train(load_run(path, [f"output_dir={plain}"]))
    override = ["stages.finetune.optim.ema=0.95", f"output_dir={averaged}"]
    train(load_run(path, override))
    assert losses(averaged) == losses(plain)
    last = averaged / "checkpoints" / "finetune-00000012"
    state = load_file(last / "optimizer.safetensors")
    model, other = (load_file(run / "final" / "model.safetensors") for run in (averaged, plain))
    names = [name.removeprefix("ema/") for name in state if name.startswith("ema/")]
    assert len(names) > 10
    for name in names:
        torch.testing.assert_close(model[name], state[f"ema/{name}"].to(model[name].dtype), rtol=0, atol=0)
    assert any(not torch.equal(model[name], other[name]) for name in names)
    found, plainly = validations(averaged), validations(plain)
    assert found.keys() == plainly.keys() and found[12]["loss"] != plainly[12]["loss"]
    shutil.rmtree(last)
    train(load_run(path, override))
    assert validations(averaged) == found and losses(averaged) == losses(plain)
    again = load_file(averaged / "final" / "model.safetensors")
    assert all(torch.equal(again[name], model[name]) for name in model)


def test_zero_has_no_means(tiny_run: TinyRun) -> None:
    config = load_run(tiny_run(), ["engine.type=deepspeed", "stages.finetune.optim.ema=0.9"])
    with pytest.raises(UserError, match=r"stages\.finetune\.optim\.ema with engine\.zero_stage: 2"):
        check_optimizer(config.stages[1].optim, config.engine, torch.device("cpu"), "stages.finetune")
