"""The gradient noise scale: the estimator on gradients whose noise is known, and in real runs."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.train.processes import Ranks, fork_server
from tinyllava_fast.config.load import load_run
from tinyllava_fast.config.schema import EngineConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.train.loop import train
from tinyllava_fast.train.noise import NoiseScale, check_noise

SHAPE = {
    "stages__finetune__optim": {"noise_scale": True, "lr": 1e-3},
    "stages__finetune__batch__packs_per_step": 4,
    "stages__pretrain__batch__packs_per_step": 4,
    "stages__pretrain__max_steps": 1,
    "stages__finetune__max_steps": 6,
    "log_every": 1,
}


@pytest.mark.parametrize("shared", [False, True])
def test_the_estimator_finds_a_noise_that_is_known(shared):
    """Gradients of single tokens are N(mean, 0.3^2) in 64 dimensions: variance 64 * 0.09, signal |mean|^2 = 0.64."""
    g = torch.Generator().manual_seed(0)
    mean = torch.full((64,), 0.1)
    found = NoiseScale({}, 4, shared=shared)
    for step in range(400):
        tokens = 3 + step % 5
        each = mean + 0.3 * torch.randn(40, 64, generator=g)
        part = each[:tokens].sum(dim=0) / 40  # divided by the tokens of the step
        found.begin(part.square().sum(), tokens)
        found.end(each.mean(dim=0).norm(), 40.0)
        if step % 7 == 0:
            found.settle(lambda tensor: tensor, torch.device("cpu"))
    found.settle(lambda tensor: tensor, torch.device("cpu"))
    scale = found.entry()
    assert scale["tokens"] == pytest.approx(64 * 0.09 / 0.64, rel=0.1)
    assert scale["packs"] == pytest.approx(scale["tokens"] / 10)


def test_two_processes_share_what_each_has_seen():
    """Of another process whose part is known: the mean of both estimates; under fsdp one part in two halves."""
    twice = [NoiseScale({}, 2, shared=shared) for shared in (False, True)]
    for one in twice:
        one.begin(torch.tensor(0.5), 4)
        one.end(torch.tensor(0.8), 10.0)
        one.settle(lambda tensor: 2 * tensor, torch.device("cpu"))
    alone = NoiseScale({}, 2, shared=False)
    alone.begin(torch.tensor(0.5), 4)
    alone.end(torch.tensor(0.8), 10.0)
    alone.settle(lambda tensor: tensor, torch.device("cpu"))
    assert twice[0].entry() == alone.entry()
    whole = NoiseScale({}, 2, shared=False)
    whole.begin(torch.tensor(1.0), 8)
    whole.end(torch.tensor(0.8), 10.0)
    whole.settle(lambda tensor: tensor, torch.device("cpu"))
    assert twice[1].entry() == whole.entry()


def test_steps_that_tell_nothing_are_left_out():
    found = NoiseScale({}, 2, shared=False)
    for tokens, norm in ((0, 1.0), (10, 1.0), (5, math.nan)):
        found.begin(torch.tensor(1.0), tokens)
        found.end(torch.tensor(norm), 10.0)
    found.settle(lambda tensor: tensor, torch.device("cpu"))
    assert found.entry() == {"tokens": None, "packs": None}


@pytest.mark.parametrize(
    ("engine", "packs", "processes", "said"),
    [
        ({"type": "torch"}, 1, 1, "set batch.packs_per_step to 2 or more"),
        ({"type": "fsdp"}, 4, 4, "set batch.packs_per_step to 8 or more"),
        ({"type": "deepspeed", "zero_stage": 1}, 8, 2, "with engine.type: deepspeed"),
    ],
)
def test_where_no_part_of_a_step_is_known_it_is_refused(tiny_run, engine, packs, processes, said):
    run = load_run(tiny_run(**SHAPE), [f"stages.finetune.batch.packs_per_step={packs}"])
    with pytest.raises(UserError, match=rf"optim\.noise_scale .*{said}"):
        check_noise(run.stages[1], EngineConfig(**engine), processes)
    check_noise(run.stages[0], EngineConfig(**engine), processes)


def test_runs_tell_it_alike_and_train_as_before(tiny_run, tmp_path, losses):
    """Also with one process of fsdp, whose part is the same pack, and resumed."""
    path = tiny_run(**SHAPE)
    train(load_run(path, ["stages.finetune.optim.noise_scale=false", f"output_dir={tmp_path / 'without'}"]))
    train(load_run(path, [f"output_dir={tmp_path / 'torch'}", "checkpoint.every_steps=3"]))
    assert losses(tmp_path / "torch") == losses(tmp_path / "without")
    with Ranks(fork_server(), tmp_path / "said", [str(path), "engine.type=fsdp"], 1) as ranks:
        assert ranks.wait(60) == [0], ranks.said(0)

    def noise(run: object) -> list[dict[str, float]]:
        entries = [json.loads(line) for line in (tmp_path / str(run) / "metrics.jsonl").read_text().splitlines()]
        return [entry["noise"] for entry in entries if entry["stage"] == "finetune"]

    whole = noise("torch")
    assert len(whole) == 6 and any(one["tokens"] for one in whole)
    for one, twin in zip(whole, noise(path.parent / "run"), strict=True):
        assert one == {name: value and pytest.approx(value, rel=1e-3) for name, value in twin.items()}
    checkpoint = tmp_path / "torch" / "checkpoints" / "finetune-00000004"
    train(load_run(path, [f"output_dir={tmp_path / 'again'}"]), resume=str(checkpoint))
    assert noise("again") == whole[3:]
    assert "Gradient noise scale" in (tmp_path / "torch" / "index.html").read_text()
