"""Two processes over gloo: the losses and the weights of one process, under every ZeRO stage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tinyllava_fast.config.load import load_run
from tinyllava_fast.errors import UserError
from tinyllava_fast.train import loop
from tinyllava_fast.train.cli import main
from tinyllava_fast.train.loop import train

VALIDATION = {"share": 0.2, "every_steps": 3, "keep": "best", "samples": 2, "max_new_tokens": 3}
WORKER = Path(__file__).with_name("distributed_worker.py")


def launch(folder: Path, *runs: str) -> None:
    """Two processes that train the runs one after another."""
    pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*command, str(folder), *runs], env=env, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr[-4000:]


def entries(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(run: Path, reference: Path) -> None:
    pairs = list(zip(entries(run), entries(reference), strict=True))
    assert len(pairs) == 12
    for found, expected in pairs:
        assert (found["step"], found["stage"], found["lr"]) == (expected["step"], expected["stage"], expected["lr"])
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        some = {"ranks", "grad_norms"}  # not every engine tells them
        assert found.keys() - some == expected.keys() - some
        if "validation" in expected:
            assert found["validation"]["loss"] == pytest.approx(expected["validation"]["loss"], abs=1e-4)
            assert found["validation"]["samples"] == expected["validation"]["samples"]
    for name in ("pretrain/model.safetensors", "final/model.safetensors"):
        found, expected = load_file(run / name), load_file(reference / name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.slow
def test_zero_stages_train_as_one_process_does(tiny_run):
    path = tiny_run(
        stages__pretrain__batch__packs_per_step=4,
        stages__finetune__batch__packs_per_step=2,
        stages__finetune__validation=VALIDATION,
    )
    folder = path.parent
    train(load_run(path, [f"output_dir={folder / 'one'}"]))
    # A run that torch began and one that ZeRO 3 began, each to be finished by the other.
    shutil.copytree(folder / "one", folder / "torch_then_zero3")
    shutil.rmtree(folder / "torch_then_zero3" / "checkpoints" / "finetune-00000012")
    stages = {f"zero{z}": f"engine.type=deepspeed,engine.zero_stage={z}" for z in (0, 1, 2, 3)}
    offload = f"{stages['zero2']},engine.offload=true"
    again = f"torch_then_zero3:{stages['zero3']}"
    (folder / "ds.json").write_text('{"zero_optimization": {"offload_param": {"device": "cpu"}}}')
    own = f"own:{stages['zero3']},engine.deepspeed={folder / 'ds.json'}"
    launch(folder, *(f"{name}:{change}" for name, change in stages.items()), f"offload:{offload}", again, own)
    for name in (*stages, "offload", "torch_then_zero3", "own"):
        assert_same_training(folder / name, folder / "one")
    shutil.rmtree(folder / "zero3" / "checkpoints" / "finetune-00000012")
    train(load_run(path, [f"output_dir={folder / 'zero3'}"]))
    assert_same_training(folder / "zero3", folder / "one")


@pytest.mark.slow
def test_lora_and_qlora_train_as_one_process_does(tiny_run):
    lora = {"tune": "lora", "lora": {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj"]}}
    recipe = {"llm": lora, "vision": lora, "connector": {"tune": "full"}}
    path = tiny_run(
        stages__pretrain__recipe=recipe, stages__finetune__recipe=recipe, checkpoint={"every_steps": 6, "keep": 2}
    )
    folder = path.parent
    qlora = [f"stages.finetune.recipe.llm.{change}" for change in ("tune=qlora", "quant=int8")]
    train(load_run(path, [f"output_dir={folder / 'one'}"]))
    train(load_run(path, [f"output_dir={folder / 'one-qlora'}", *qlora]))
    shutil.copytree(folder / "one", folder / "torch_then_zero3")
    shutil.rmtree(folder / "torch_then_zero3" / "checkpoints" / "finetune-00000012")
    stages = {f"zero{z}": f"engine.type=deepspeed,engine.zero_stage={z}" for z in (0, 2, 3)}
    runs = [f"{name}:{change}" for name, change in stages.items()]
    launch(folder, *runs, f"torch_then_zero3:{stages['zero3']}", f"zero2-qlora:{','.join([stages['zero2'], *qlora])}")
    for name in (*stages, "torch_then_zero3"):
        assert_same_training(folder / name, folder / "one")
        assert_same_adapter(folder / name, folder / "one")
    assert_same_training(folder / "zero2-qlora", folder / "one-qlora")
    assert_same_adapter(folder / "zero2-qlora", folder / "one-qlora")


def assert_same_adapter(run: Path, reference: Path) -> None:
    for name in ("pretrain", "final"):
        found, expected = (load_file(r / name / "adapter" / "adapter_model.safetensors") for r in (run, reference))
        assert found.keys() == expected.keys() and len(found) == 2 * 3
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


def test_deepspeed_without_torchrun_is_one_process(tiny_run, losses, monkeypatch):
    """In this process: a group of one; stopped in the middle and resumed."""
    pytest.importorskip("deepspeed")
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    path = tiny_run(stages__finetune__validation=VALIDATION)
    folder = path.parent
    train(load_run(path, [f"output_dir={folder / 'one'}"]))
    for zero in (2, 3):
        run = folder / f"zero{zero}"
        changes = [f"output_dir={run}", "engine.type=deepspeed", f"engine.zero_stage={zero}"]
        assert main([str(path), *changes]) == 0
        shutil.rmtree(run / "checkpoints" / "finetune-00000012")
        assert main([str(path), *changes]) == 0
        assert_same_training(run, folder / "one")


def _states(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """Weights and masters at the end of every stage that trains from now on."""
    found: list[dict[str, torch.Tensor]] = []
    save = loop.Stage._save_output

    def kept(stage: loop.Stage) -> None:
        items = [*stage.engine.model_state(), *stage.engine.optimizer_state()]
        found.append({item.name: item.fetch().clone() for item in items})
        save(stage)

    monkeypatch.setattr(loop.Stage, "_save_output", kept)
    return found


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bfloat16_weights_are_dithered_from_their_masters_and_resume_exactly(tiny_run, losses, monkeypatch, zero):
    pytest.importorskip("deepspeed")
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    engine = {"dtype": "bfloat16", "workers": 0, "threads": 1, "device": "cpu", "type": "deepspeed", "zero_stage": zero}
    path = tiny_run(engine=engine, checkpoint__every_steps=4)
    whole, run = path.parent / "whole", path.parent / "run"
    states = _states(monkeypatch)
    train(load_run(path, [f"output_dir={whole}"]))
    weights = {name: t for name, t in states[-1].items() if f"master/{name}" in states[-1]}
    masters = torch.cat([states[-1][f"master/{name}"].flatten() for name in weights])
    rounded = torch.cat([t.flatten() for t in weights.values()])
    up = torch.nextafter(masters.bfloat16(), torch.full_like(rounded, torch.inf))
    down = torch.nextafter(masters.bfloat16(), torch.full_like(rounded, -torch.inf))
    assert ((rounded >= down) & (rounded <= up)).all()
    away = (rounded != masters.bfloat16()).float().mean()
    assert 0.15 < away < 0.35  # a quarter of what lies between two numbers goes to the further one
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "finetune-00000012")
    train(load_run(path))
    assert losses(run) == losses(whole)
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[2].items())
    one = path.parent / "one"
    train(load_run(path, [f"output_dir={one}", "engine.type=torch", "engine.zero_stage=2"]))
    for (_, _, found), (_, _, expected) in zip(losses(run), losses(one), strict=True):
        assert found == pytest.approx(expected, abs=0.02)


def test_deepspeed_that_is_not_installed(tiny_run, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"deepspeed does not import .*tinyllava-fast\[train\]"):
        train(load_run(tiny_run(), ["engine.type=deepspeed"]))
