"""A checkpoint as a model folder: the folder that its stage leaves, byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.train.conftest import prepare
from tinyllava_fast.config.load import load_run
from tinyllava_fast.convert.cli import main
from tinyllava_fast.train.loop import train

LORA = {"tune": "lora", "lora": {"r": 4, "alpha": 8, "target_modules": ["q_proj"]}}
CASES: dict[str, dict[str, Any]] = {
    "float32": {"stages__finetune__data__image_mode": "anyres", "stages__finetune__batch__tokens": 200},
    "bfloat16, lora": {"engine__dtype": "bfloat16", "stages__finetune__recipe__llm": LORA},
    "bfloat16, means": {"engine__dtype": "bfloat16", "stages__finetune__optim__ema": 0.9},
    "int8": {"stages__finetune__recipe__llm": {**LORA, "tune": "qlora", "quant": "int8"}},
}
SHORT = {"stages__pretrain__max_steps": 1, "stages__finetune__max_steps": 2, "checkpoint__keep": 9}


def assert_same_folder(found: Path, expected: Path) -> None:
    """Every file has the bytes of its twin."""
    names, twins = (sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in (found, expected))
    assert names == twins and Path("model.safetensors") in names
    assert [name for name in names if (found / name).read_bytes() != (expected / name).read_bytes()] == []


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_becomes_the_folder_of_its_stage(tmp_path: Path, name: str) -> None:
    if name == "int8":
        pytest.importorskip("bitsandbytes")
    path, run = prepare(tmp_path, **SHORT, **CASES[name]), tmp_path / "run"
    if "batch" in "".join(CASES[name]):
        path = prepare(tmp_path, **SHORT, **CASES[name], stages__finetune__batch__max_images=12)
    train(load_run(path))
    for checkpoint, stage in (("pretrain-00000001", "pretrain"), ("finetune-00000003", "final")):
        target = tmp_path / f"from-{checkpoint}"
        assert main(["consolidate", str(run / "checkpoints" / checkpoint), str(target)]) == 0
        assert_same_folder(target, run / stage)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with three checkpoints. Read only."""
    folder = tmp_path_factory.mktemp("trained")
    train(load_run(prepare(folder, **SHORT, checkpoint__every_steps=1)))
    return folder / "run"


def test_of_a_run_the_newest_intact_checkpoint_is_taken(trained: Path, tmp_path: Path) -> None:
    run, target = tmp_path / "run", tmp_path / "model"
    shutil.copytree(trained, run)
    weights = run / "checkpoints" / "finetune-00000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"flip")
    assert main(["consolidate", str(run), str(target)]) == 0
    again = tmp_path / "again"
    assert main(["consolidate", str(run / "checkpoints" / "finetune-00000002"), str(again)]) == 0
    assert_same_folder(target, again)


def test_mistakes_are_named(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, target = tmp_path / "run", tmp_path / "model"
    shutil.copytree(trained, run)
    newest = run / "checkpoints" / "finetune-00000003"
    (newest / "optimizer.safetensors").unlink()

    def said(*arguments: str | Path) -> str:
        assert main(["consolidate", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "optimizer.safetensors: missing; give another checkpoint, or the run folder" in said(newest, target)
    assert "exists; choose another folder" in said(run, run)
    assert "not a checkpoint, it has no state.json" in said(run / "final", target)
    before = run / "checkpoints" / "finetune-00000002"
    state = json.loads((before / "state.json").read_text())
    state["parts"]["tokenizer"] = "another"
    del state["checksums"]
    (before / "state.json").write_text(json.dumps(state))
    (before / "checksums.json").unlink()
    assert "the tokenizer that its configuration names is not what it was trained with" in said(before, target)
    assert not target.exists() and not list(tmp_path.glob(".tmp-*"))
