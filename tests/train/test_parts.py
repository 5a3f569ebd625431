"""The files that a run's model was built from may move between a checkpoint and its continuation, not change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.train.conftest import prepare
from tests.train.test_resume import back_to, errors, run_cli
from tinyllava_fast.train.checkpoint import CheckpointStore


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """(folder, the YAML of a finished run that began from a model folder beside it). Read only."""
    folder = tmp_path_factory.mktemp("parts")
    path = prepare(folder, stages__pretrain__max_steps=1, stages__finetune__max_steps=3)
    assert run_cli(path, f"output_dir={folder / 'first'}") == 0
    shutil.move(folder / "first" / "final", folder / "base")
    config = yaml.safe_load(path.read_text()) | {"model": {"path": str(folder / "base")}}
    path.write_text(yaml.safe_dump(config))
    assert run_cli(path) == 0
    return folder, path


@pytest.fixture
def moved(trained, tmp_path) -> tuple[Path, Path, list[str]]:
    """(copy of the model folder, run folder that stands at its third of four steps, overrides)."""
    folder, _ = trained
    run, base = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(folder / "run", run)
    shutil.copytree(folder / "base", base)
    back_to(run, "finetune-00000003")
    return base, run, [f"output_dir={run}", f"model.path={base}"]


def test_a_model_folder_may_move(trained, moved, losses):
    folder, path = trained
    _, run, overrides = moved
    assert run_cli(path, *overrides) == 0
    assert losses(run) == losses(folder / "run")
    final, twin = ((r / "final" / "model.safetensors").read_bytes() for r in (run, folder / "run"))
    assert final == twin


def test_other_weights_there_do_not_matter(trained, moved, losses):
    """Those of the checkpoint count."""
    folder, path = trained
    base, run, overrides = moved
    shutil.copy(folder / "run" / "final" / "model.safetensors", base)
    assert run_cli(path, *overrides) == 0
    assert losses(run) == losses(folder / "run")


def _edit(file: Path, change) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def _swap_tokens(values) -> None:
    vocabulary = values["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]


OTHER = {
    "tokenizer": ("tokenizer.json", _swap_tokens),
    "image processor": ("preprocessor_config.json", lambda v: v.update(image_mean=[0.1, 0.2, 0.3])),
    "architecture": ("config.json", lambda v: v["llm"]["config"].update(rms_norm_eps=1e-3)),
}


@pytest.mark.parametrize("part", OTHER)
def test_other_files_there_are_refused_by_name(trained, moved, losses, caplog, part):
    folder, path = trained
    base, run, overrides = moved
    name, change = OTHER[part]
    _edit(base / name, change)
    assert run_cli(path, *overrides) == 2
    said = errors(caplog)
    assert f"model.path: may name another place of the same files, but the {part} there is not what" in said
    shutil.copy(folder / "base" / name, base / name)
    assert run_cli(path, *overrides) == 0
    assert losses(run) == losses(folder / "run")


def test_a_checkpoint_that_notes_nothing_of_its_model_says_where_to_put_it(trained, moved, caplog):
    _, path = trained
    _, run, overrides = moved
    for name in CheckpointStore(run / "checkpoints", 9).names():
        _edit(run / "checkpoints" / name / "state.json", lambda state: [state.pop(k) for k in ("parts", "checksums")])
        (run / "checkpoints" / name / "checksums.json").unlink()
    assert run_cli(path, *overrides) == 2
    assert "this checkpoint does not tell what those files held: put them back where they were" in errors(caplog)
    assert run_cli(path, overrides[0]) == 0


def test_a_tokenizer_may_move(tiny_run, losses):
    path = tiny_run(stages__pretrain__max_steps=1, stages__finetune__max_steps=2)
    run, folder = path.parent / "run", path.parent
    assert run_cli(path) == 0
    lines = losses(run)
    back_to(run, "finetune-00000002")
    shutil.move(folder / "tokenizer", folder / "words")
    assert run_cli(path, f"model.llm.tokenizer={folder / 'words'}") == 0
    assert losses(run) == lines
