"""`tlf-bench train` on a tiny model: both processes, the race, the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.bench.conftest import RecordingGate
from tinyllava_fast.bench import cli, sides, train
from tinyllava_fast.bench.settings import TrainSettings
from tinyllava_fast.config.load import load_run
from tinyllava_fast.errors import UserError

pytest.importorskip("easy_vqa")
SETTINGS = TrainSettings(rounds=1, warmup=1, samples=2, peers=("float32",), quick=True)


@pytest.mark.slow
def test_the_command(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two worker processes, two rounds, the JSON's keys."""
    target = tmp_path / "train.json"
    flags = ["--rounds", "2", "--warmup", "1", "--samples", "2", "--quick", "--peer", "bf16"]
    assert cli.main(["train", "--config", str(config), *flags, "--json", str(target), "seed=3"]) == 0
    report = json.loads(target.read_text())
    keys = {"ratio", "mfu", "rss_ratio", "samples_per_s", "peer", "spread", "losses"}
    assert keys <= set(report)
    fastest = report["peers"][report["peer"]["weights"]]
    assert fastest["samples_per_s"] == max(one["samples_per_s"] for one in report["peers"].values())
    assert report["ratio"] == pytest.approx(report["samples_per_s"] / report["peer"]["samples_per_s"])
    assert report["spread"]["min"] <= report["spread"]["max"] and report["rss_ratio"] > 0 and report["mfu"] > 0
    assert len(report["losses"]["ours"]) == len(report["losses"]["peer"]) == len(report["losses"]["reference"]) == 3
    assert report["losses"]["gap"]["reference"] < 1e-3 and report["losses"]["gap"]["bf16"] < 0.05
    assert report["run"]["seed"] == 3 and set(report["peers"]) == {"bf16"}
    out = capsys.readouterr().out
    assert "transformers + Trainer, bf16" in out and "same samples" in out


def test_qlora_is_compared_with_our_lora_and_with_pefts(config: Path, tmp_path: Path) -> None:
    """Without processes: what each side of the race runs, and the report made of it."""
    settings = replace(SETTINGS, mode="qlora", lora_rank=4, peers=("bf16",))
    shapes = [f"model.llm.config.{k}" for k in ("hidden_size=64", "intermediate_size=128", "num_attention_heads=4")]
    shapes += ["engine.dtype=bfloat16"]
    runs = {mode: load_run(train.compose(config, shapes, tmp_path, settings, mode)) for mode in ("qlora", "lora")}
    measured = {}
    for name, side, mode in (("ours", "ours", "qlora"), ("ours-lora", "ours", "lora"), ("peer-bf16", "peer", "lora")):
        gate = RecordingGate()
        sides.serve(side, runs[mode], gate, per_step=2, precision="bf16")  # type: ignore[arg-type]
        measured[name] = train.Measured(dict(gate.facts), [1.0], gate.losses, [1.0], 2**20 * (1 + len(measured)))
    gemm = [{"gemm": {"bfloat16": {"flops_per_s": 1e12}}}] * 2
    report = train.compose_report(measured, gemm, runs["qlora"], settings)
    llm = report["run"]["stages"][0]["recipe"]["llm"]
    assert (llm["tune"], llm["lora"]["r"], llm["lora"]["alpha"]) == ("qlora", 4, 8)
    assert (report["beside"]["mode"], report["beside"]["rss_ratio"], report["rss_ratio"]) == ("lora", 0.5, 1 / 3)
    # the dropout masks are others, and the weights of ours are rounded to 4 bits; the model is the same
    assert report["beside"]["losses"] == pytest.approx(report["peer"]["losses"], rel=0.03)
    assert report["ours"]["losses"] == pytest.approx(report["beside"]["losses"], rel=0.1)
    train.show(report)


def test_a_run_has_one_stage(config: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(config.read_text())
    tree["stages"].append({**tree["stages"][0], "name": "again"})
    config.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="exactly one stage, this has 2"):
        train.compose(config, [], tmp_path, SETTINGS)


def test_what_the_peer_cannot_train_is_refused(config: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe\.vision\.tune: 'lora'; the peer knows frozen and full"):
        train.compose(config, ["stages.0.recipe.vision.tune=lora"], tmp_path, SETTINGS)
    with pytest.raises(UserError, match=r"recipe\.llm\.tune: 'qlora'; the peer knows"):
        train.compose(config, ["stages.0.recipe.llm.tune=qlora"], tmp_path, SETTINGS)
    with pytest.raises(UserError, match="optim: the peer knows neither label_smoothing nor z_loss"):
        train.compose(config, ["stages.0.optim.z_loss=1e-4"], tmp_path, SETTINGS)
