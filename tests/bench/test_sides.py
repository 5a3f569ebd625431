"""The sides of the training benchmarks without their processes: the same samples, the same losses, and their facts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.conftest import RecordingGate
from tinyllava_fast.bench import sides, train
from tinyllava_fast.bench.settings import RECIPES, TrainSettings
from tinyllava_fast.config.load import load_run
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.train import compile as compiling

pytest.importorskip("easy_vqa")
SETTINGS = TrainSettings(rounds=1, warmup=1, samples=2, peers=("float32",), quick=True)
SHAPES = [f"model.llm.config.{k}" for k in ("hidden_size=64", "intermediate_size=128", "num_attention_heads=4")]


@pytest.mark.parametrize("mode", ["finetune", "pretrain-cached", "lora"])
def test_both_sides_see_the_same_samples_and_agree(config: Path, tmp_path: Path, mode: str) -> None:
    """Without processes: packs from real records, real template and pixels, equal losses in float32."""
    overrides = ["stages.0.recipe.llm.lora.dropout=0"] if mode == "lora" else []
    run = load_run(train.compose(config, overrides, tmp_path, replace(SETTINGS, mode=mode, lora_rank=4)))
    gates = {side: RecordingGate() for side in ("ours", "peer")}
    for side, gate in gates.items():
        checkpointing = mode != "finetune"
        sides.serve(side, run, gate, per_step=2, precision="float32", checkpointing=checkpointing)  # type: ignore[arg-type]
    ours, peer = gates["ours"].losses, gates["peer"].losses
    assert len(ours) == 2 and ours == pytest.approx(peer, abs=1e-3) and ours[0] == pytest.approx(peer[0], abs=1e-4)
    facts = gates["ours"].facts
    assert ("adapters" in facts["flops"]) == (mode == "lora")  # type: ignore[operator]
    assert (facts["flops"]["tower"] == 0) == mode.endswith("cached")  # type: ignore[index]
    assert facts["budget"] % 64 == 0  # type: ignore[operator]
    assert facts["tokens_per_step"] <= facts["padded_tokens_per_step"]  # type: ignore[operator]
    assert 0 < facts["supervised_per_step"] < facts["tokens_per_step"]  # type: ignore[operator]


def test_our_side_recomputes_what_the_config_says(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["engine.gradient_checkpointing=selective", "engine.compile=regional"]
    run = load_run(train.compose(config, overrides, tmp_path, SETTINGS))
    built: list[LMM] = []

    def compiles(lmm: LMM, layers: list[object], cuda_graphs: bool) -> None:
        assert layers == lmm.layers and not cuda_graphs
        built.append(lmm)

    monkeypatch.setattr(compiling, "CompiledForward", compiles)  # sees the model as it is about to train
    sides.serve("ours", run, RecordingGate(), per_step=2, precision="float32")  # type: ignore[arg-type]
    assert [layer.gradient_checkpointing for layer in built[0].llm.model.layers] == [True, False]  # type: ignore[operator, union-attr]


def test_state_is_counted_from_the_tensors(config: Path, tmp_path: Path) -> None:
    states = {}
    for name, (mode, added) in RECIPES.items():
        settings = TrainSettings(rounds=1, warmup=1, samples=1, mode=mode, lora_rank=4)
        run = load_run(train.compose(config, [*SHAPES, "engine.dtype=bfloat16", *added], tmp_path, settings))
        gate = RecordingGate()
        sides.serve("ours", run, gate, per_step=1, precision="bf16")  # type: ignore[arg-type]
        states[name] = gate.facts["state_bytes"]
        parameters = gate.facts["parameters"]
    full, eight = states["full, AdamW"], states["full, 8-bit AdamW"]  # type: ignore[index]
    assert full["weights"] == 2 * parameters and full["moments"] == 2 * full["masters"]  # type: ignore[index]
    assert full["gradients"] == 1.5 * full["masters"]  # type: ignore[index]
    assert eight["moments"] < 0.8 * full["moments"] and eight["weights"] == full["weights"]  # type: ignore[index]
    lora, qlora = states["lora"], states["qlora"]
    assert qlora["weights"] < lora["weights"] and qlora["moments"] == lora["moments"]  # type: ignore[index]
    assert lora["masters"] < 0.5 * full["masters"]  # type: ignore[index]
