"""Steps that are no number: they change nothing, they are counted, their records are listed, and a limit stops them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.train.mixes import write_mix
from tests.train.processes import Ranks, fork_server
from tinyllava_fast.config.load import load_run
from tinyllava_fast.config.schema import EngineConfig, OptimConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.train.engine import launch
from tinyllava_fast.train.engine.torch_engine import TorchEngine
from tinyllava_fast.train.loop import train
from tinyllava_fast.train.nonfinite import FILE
from tinyllava_fast.train.optim import MasterOptimizer
from tinyllava_fast.train.optimizers.base import check_optimizer

TinyRun = Callable[..., Path]
SKIP = [f"stages.finetune.optim.{key}" for key in ("on_nonfinite=skip", "most_skipped=50")]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def plant(record: str, *, gradient: bool = False) -> None:
    """From now on the loss, or a gradient, of a pack with this record is no number."""
    from tinyllava_fast.train.engine.fsdp_engine import FSDPEngine

    for engine in (TorchEngine, FSDPEngine):
        plain = engine.forward_backward

        def spoilt(self: Any, batch: Any, scale: float, plain: Any = plain) -> torch.Tensor:
            losses: torch.Tensor = plain(self, batch, scale)
            if record not in batch.sample_ids:
                return losses
            if gradient:
                first = next(p for p in self._optimizer._low if p in self._optimizer._found)
                self._optimizer._found[first].fill_(torch.inf)
                return losses
            return losses * torch.nan

        engine.forward_backward = spoilt  # type: ignore[method-assign]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``plant``, undone afterwards."""
    from tinyllava_fast.train.engine.fsdp_engine import FSDPEngine

    for engine in (TorchEngine, FSDPEngine):
        monkeypatch.setattr(engine, "forward_backward", engine.forward_backward)
    return plant


def make(dtype: torch.dtype, **optim: Any) -> tuple[list[nn.Parameter], MasterOptimizer]:
    g = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(8, 4, generator=g).to(dtype)), nn.Parameter(torch.randn(4).to(dtype) * 0)]
    names = {p: f"llm.{number}" for number, p in enumerate(weights)}
    groups: Any = [{"name": "llm", "params": weights, "lr": 0.1, "weight_decay": 0.1}]
    return weights, MasterOptimizer(groups, names, OptimConfig(**optim))


def step(made: tuple[list[nn.Parameter], MasterOptimizer], seed: int, *, bad: str = "") -> torch.Tensor:
    weights, optimizer = made
    g = torch.Generator().manual_seed(seed)
    for p in weights:
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
    if bad == "gradient":
        weights[1].grad[2] = torch.inf  # type: ignore[index]
    optimizer.accumulate()
    return optimizer.step({"llm": 0.1}, torch.tensor(torch.nan if bad == "loss" else 1.0))


@pytest.mark.parametrize("bad", ["gradient", "loss"])
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {}),
        (torch.float32, {"ema": 0.9}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"type": "muon"}),
        (torch.bfloat16, {"type": "lion8bit"}),
    ],
    ids=["adamw", "ema", "masters", "muon", "lion8bit"],
)
def test_a_skipped_step_changes_nothing(dtype: torch.dtype, settings: dict[str, Any], bad: str) -> None:
    found, twin = make(dtype, **settings), make(dtype, **settings)
    for seed in range(3):
        assert torch.equal(step(found, seed), step(twin, seed))
    assert not step(found, 7, bad=bad).isfinite()
    assert step(found, 3).isfinite() and step(twin, 3).isfinite()
    for one, other in zip(found[1].state(), twin[1].state(), strict=True):
        assert one.name == other.name and torch.equal(one.fetch(), other.fetch()), one.name
    assert all(torch.equal(p, q) for p, q in zip(found[0], twin[0], strict=True))


def test_norms_of_components_make_up_the_norm(tiny_run: TinyRun) -> None:
    for dtype in ("float32", "bfloat16"):
        path = tiny_run(engine__dtype=dtype, stages__finetune__max_steps=2, stages__pretrain__max_steps=1)
        run = path.parent / dtype
        train(load_run(path, [f"output_dir={run}"]))
        first, *others = lines(run / "metrics.jsonl")
        assert "grad_norms" not in first  # of the connector alone
        for entry in others:
            assert set(entry["grad_norms"]) == {"vision", "connector", "llm"}
            squares = sum(norm**2 for norm in entry["grad_norms"].values())
            assert squares**0.5 == pytest.approx(entry["grad_norm"], rel=1e-5)


def test_skipped_steps_are_counted_listed_and_resumed(tmp_path: Path, planted: Any, caplog: Any) -> None:
    """Among several sources, whose losses go on without the step; the lines of metrics.jsonl span several steps."""
    path = write_mix(tmp_path, checkpoint__every_steps=2, checkpoint__keep=9, stages__finetune__max_steps=12)
    planted("r5")
    run = path.parent / "run"
    summary = train(load_run(path, [*SKIP, "log_every=3"]))
    metrics, listed = lines(run / "metrics.jsonl"), lines(run / FILE)
    steps = {line["step"] for line in listed}
    counts = [entry["skipped_steps"] for entry in metrics]
    assert 0 < sum(counts) == len(steps) < 12 and summary["skipped_steps"] == {"finetune": len(steps)}
    assert {line["source"] for line in listed} >= {"colours"} and {line["loss"] for line in listed} == {"nan"}
    assert all("r5" in line["records"] for line in listed if line["source"] == "colours")
    assert all(entry["loss"] > 0 for entry in metrics if entry["skipped_steps"] < 3)
    told = [one["loss"] for entry in metrics for one in entry["sources"].values() if one["loss"] is not None]
    assert len(told) > len(metrics) and all(loss == loss for loss in told)
    assert f"its records are listed in {run / FILE}" in caplog.text
    saved = (run / "metrics.jsonl").read_text(), (run / FILE).read_text()
    untimed = [{k: entry[k] for k in ("step", "loss", "grad_norm", "skipped_steps", "sources")} for entry in metrics]
    names = sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir())
    for name in names[len(names) // 2 :]:
        shutil.rmtree(run / "checkpoints" / name)
    train(load_run(path, [*SKIP, "log_every=3"]))
    again = lines(run / "metrics.jsonl")
    assert [{k: entry[k] for k in one} for entry, one in zip(again, untimed, strict=True)] == untimed
    assert (run / FILE).read_text() == saved[1]


def test_a_step_that_is_no_number_stops_the_run_and_names_its_records(tiny_run: TinyRun, planted: Any) -> None:
    path = tiny_run(log_every=4)
    planted("r5")
    run = path.parent / "run"
    with pytest.raises(
        UserError, match=rf"step \d+ \(\w+\): loss nan.*training diverged; lower .* are listed in {run}"
    ):
        train(load_run(path))
    assert any("r5" in line["records"] for line in lines(run / FILE))
    assert "r5" in {name for line in lines(run / FILE)[:1] for name in line["records"]}


@pytest.mark.parametrize(
    ("limit", "words"),
    [("most_skipped_in_a_row=2", "3 steps in a row, more than"), ("most_skipped=1", "2 steps of the stage, more than")],
)
def test_too_many_skipped_steps_stop_the_run(
    limit: str, words: str, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_run(stages__pretrain__max_steps=1)
    plain = TorchEngine.forward_backward
    monkeypatch.setattr(TorchEngine, "forward_backward", lambda *a: plain(*a) * torch.inf)
    keys = [f"stages.{stage}.optim.{key}" for stage in ("pretrain", "finetune") for key in ("on_nonfinite=skip", limit)]
    with pytest.raises(UserError, match=rf"training diverged in {words} \S*optim\.{limit.replace('=', ': ')}; lower "):
        train(load_run(path, keys))
    first = lines(path.parent / "run" / "metrics.jsonl")[0]
    assert first["loss"] is None and first["grad_norm"] is None and first["skipped_steps"] == 1


@pytest.fixture(scope="module")
def server() -> Any:
    return fork_server()


def plant_r5() -> None:
    """A fault of processes."""
    plant("r5")


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_processes_skip_alike(engine: str, server: Any, tiny_run: TinyRun, planted: Any, tmp_path: Path) -> None:
    path = tiny_run(stages__pretrain__max_steps=1, stages__finetune__max_steps=5)
    one, run = path.parent / "one", path.parent / "run"
    skip = [*SKIP, "stages.pretrain.optim.on_nonfinite=skip"]
    arguments = [str(path), f"output_dir={run}", f"engine.type={engine}", *skip]
    with Ranks(server, tmp_path / "said", arguments, faults=dict.fromkeys(range(2), plant_r5)) as ranks:
        planted("r5")
        train(load_run(path, [f"output_dir={one}", *skip]))
        assert ranks.wait() == [0, 0], ranks.said(0)
    alone, both = lines(one / "metrics.jsonl"), lines(run / "metrics.jsonl")
    assert 0 < sum(entry["skipped_steps"] for entry in alone) < 6
    for entry, twin in zip(alone, both, strict=True):
        assert entry["skipped_steps"] == twin["skipped_steps"]
        for key in ("loss", "grad_norm"):
            assert entry[key] == (twin[key] if entry[key] is None else pytest.approx(twin[key], rel=1e-4))
    for entry, twin in zip(lines(one / FILE), lines(run / FILE), strict=True):
        assert sorted(entry["records"]) == sorted(twin["records"]) and entry["step"] == twin["step"]


def test_what_deepspeed_cannot_skip_is_refused() -> None:
    engine, skip = EngineConfig(type="deepspeed"), OptimConfig(on_nonfinite="skip")
    with pytest.raises(UserError, match=r"stages\.s\.optim\.on_nonfinite: skip with engine\.type: deepspeed"):
        check_optimizer(skip, engine, torch.device("cpu"), "stages.s")
    check_optimizer(skip, EngineConfig(type="deepspeed", zero_stage=0), torch.device("cpu"), "stages.s")


def test_float16_is_for_gpus_and_not_deepspeeds() -> None:
    for engine, device, message in (
        (EngineConfig(dtype="float16"), "cpu", "float16 on a CPU"),
        (EngineConfig(dtype="float16", type="deepspeed"), "cuda", "whose scaling of the loss is its own"),
    ):
        with pytest.raises(UserError, match=message):
            launch.check_dtype(engine, device)
    launch.check_dtype(EngineConfig(dtype="float16"), "cuda")


def test_float16_scales_its_loss_and_leaves_out_what_overflows(
    tiny_run: TinyRun, planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where users are refused: torch computes it there, too, slowly."""
    path = tiny_run(checkpoint__keep=9)
    plain, run = path.parent / "plain", path.parent / "run"
    train(load_run(path, [f"output_dir={plain}"]))
    monkeypatch.setattr(launch, "check_dtype", lambda *_: None)
    half = ["engine.dtype=float16"]
    train(load_run(path, half))
    exact, found = lines(plain / "metrics.jsonl"), lines(run / "metrics.jsonl")
    for entry, twin in zip(exact, found, strict=True):
        assert entry["loss"] == pytest.approx(twin["loss"], rel=1e-2)
        assert entry["grad_norm"] == pytest.approx(twin["grad_norm"], rel=5e-2)
        assert twin["loss_scale"] == 65536.0 and twin["skipped_steps"] == 0
        assert twin.get("grad_norms", {}) == pytest.approx(entry.get("grad_norms", {}), rel=0.1)
    shutil.rmtree(run)
    planted("r5", gradient=True)
    summary = train(load_run(path, half))
    found = lines(run / "metrics.jsonl")
    left_out = sum(entry["skipped_steps"] for entry in found)
    assert 0 < left_out < 12 and sum(summary["skipped_steps"].values()) == left_out  # type: ignore[attr-defined]
    assert not (run / FILE).exists()
    scale = 65536.0
    for entry in found[4:]:
        scale /= 2 ** entry["skipped_steps"]
        assert entry["loss_scale"] == scale and (entry["grad_norm"] is None) == bool(entry["skipped_steps"])
    shutil.rmtree(run / "checkpoints" / "finetune-00000012")
    train(load_run(path, half))
    again = lines(run / "metrics.jsonl")
    assert [(e["loss"], e["loss_scale"]) for e in again] == [(e["loss"], e["loss_scale"]) for e in found]


def test_a_scale_that_falls_for_ever_is_a_divergence(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_run(stages__pretrain__max_steps=1)
    monkeypatch.setattr(launch, "check_dtype", lambda *_: None)
    monkeypatch.setattr("tinyllava_fast.train.loss_scale.FIRST", 1.0)
    monkeypatch.setattr(MasterOptimizer, "_norm", lambda self, *_: self.norms.clear() or torch.tensor(torch.inf))
    with pytest.raises(UserError, match=r"training diverged, for gradients overflow though the loss is scaled by 0\.5"):
        train(load_run(path, ["engine.dtype=float16"]))
