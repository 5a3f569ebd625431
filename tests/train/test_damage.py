"""A checkpoint that the disk has damaged: the one before it is taken, and the run ends as if nothing had happened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.conftest import prepare
from tinyllava_fast.train import cli
from tinyllava_fast.train.checkpoint import CheckpointStore, damage
from tinyllava_fast.train.checksums import MANIFEST, Checksum, manifest

SHORT = {"stages__pretrain__max_steps": 1, "stages__finetune__max_steps": 3, "checkpoint__every_steps": 1}
NEWEST, BEFORE = "finetune-00000004", "finetune-00000003"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The YAML of a finished run of four checkpoints, whose folder is ``run`` beside it. Read only."""
    path = prepare(tmp_path_factory.mktemp("trained"), **SHORT, checkpoint__keep=3)
    assert cli.main([str(path)]) == 0
    return path


@pytest.fixture
def copied(trained, tmp_path) -> tuple[Path, list[str]]:
    """(checkpoints, arguments that go on): a copy of that run."""
    shutil.copytree(trained.parent / "run", tmp_path / "run")
    return tmp_path / "run" / "checkpoints", [str(trained), f"output_dir={tmp_path / 'run'}"]


def flip(path: Path) -> None:
    """Change a byte two thirds into the file, as a disk does."""
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "model flipped": (flip, "model.safetensors", "its checksum is"),
    "optimizer flipped": (flip, "optimizer.safetensors", "its checksum is"),
    "random state flipped": (flip, "rng-0.safetensors", "its checksum is"),
    "state flipped": (flip, "state.json", "its checksum is"),
    "model cut": (cut, "model.safetensors", "truncated or damaged"),
    "optimizer missing": (Path.unlink, "optimizer.safetensors", "missing"),
    "random state missing": (Path.unlink, "rng-0.safetensors", "missing"),
    "state missing": (Path.unlink, "state.json", "missing"),
    "checksums flipped": (flip, "checksums.json", "checksum"),
    "checksums cut": (cut, "checksums.json", "checksums.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(copied, trained, losses, caplog, name):
    folder, arguments = copied
    harm, file, said = DAMAGES[name]
    harm(folder / NEWEST / file)
    assert cli.main(arguments) == 0
    warning = next(r.getMessage() for r in caplog.records if "trying the checkpoint before it" in r.getMessage())
    assert f"{folder / NEWEST}" in warning and said in warning and (file in warning or "checksums" in name)
    assert f"resuming from {folder / BEFORE}" in caplog.text
    assert losses(folder.parent) == losses(trained.parent / "run")
    final = [run / "final" / "model.safetensors" for run in (folder.parent, trained.parent / "run")]
    assert final[0].read_bytes() == final[1].read_bytes()
    assert damage(folder / NEWEST) == ""


def test_a_damaged_checkpoint_named_by_path_is_refused_and_a_good_one_named(copied, caplog):
    folder, arguments = copied
    flip(folder / NEWEST / "model.safetensors")
    cut(folder / BEFORE / "optimizer.safetensors")
    assert cli.main([*arguments, "--resume", str(folder / NEWEST)]) == 2
    said = caplog.records[-1].getMessage()
    assert f"{folder / NEWEST / 'model.safetensors'}: damaged" in said
    assert f"resume from an older one with --resume {folder / 'finetune-00000002'}" in said
    (folder / NEWEST / "state.json").unlink()
    assert cli.main([*arguments, "--resume", str(folder / NEWEST)]) == 2
    assert f"{folder / NEWEST / 'state.json'}: missing; resume from" in caplog.records[-1].getMessage()


def test_when_all_are_damaged_nothing_starts_over_by_itself(copied, caplog):
    folder, arguments = copied
    for name in CheckpointStore(folder, 9).names():
        flip(folder / name / "model.safetensors")
    assert cli.main(arguments) == 2
    assert "no checkpoint in it is intact; put back a copy of one, or start over with --resume never" in caplog.text
    assert len(CheckpointStore(folder, 9).names()) == 3


def test_a_damaged_checkpoint_is_not_kept_in_place_of_a_good_one(trained, tmp_path, losses):
    """Three are kept: 2, 3 and 4, of which 4 and 3 are damaged; the run goes on from 2 with other numbers of steps."""
    run = tmp_path / "run"
    shutil.copytree(trained.parent / "run", run)
    folder = run / "checkpoints"
    for name in (NEWEST, BEFORE):
        flip(folder / name / "model.safetensors")
    arguments = [str(trained), f"output_dir={run}", "checkpoint.every_steps=2", "checkpoint.keep=2"]
    assert cli.main(arguments) == 0
    kept = CheckpointStore(folder, 9).names()
    assert kept == ["finetune-00000003", NEWEST]  # written anew at step 2 of the stage, and at its end
    assert all(damage(folder / name) == "" for name in kept)
    assert losses(run) == losses(trained.parent / "run")


def test_a_checkpoint_without_checksums_is_taken_as_before(copied, losses, trained, caplog):
    folder, arguments = copied
    for name in CheckpointStore(folder, 9).names():
        (folder / name / "checksums.json").unlink()
        state = json.loads((folder / name / "state.json").read_text())
        del state["checksums"]  # as versions before there were any wrote it
        (folder / name / "state.json").write_text(json.dumps(state))
    cut(folder / NEWEST / "model.safetensors")
    assert cli.main(arguments) == 0
    assert f"resuming from {folder / BEFORE}" in caplog.text and "model.safetensors: truncated" in caplog.text
    assert losses(folder.parent) == losses(trained.parent / "run")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00nonsense", b"", b"finetune-00000099\n"])
def test_a_damaged_marker_is_told_and_the_newest_taken(copied, caplog, content):
    folder, arguments = copied
    (folder / "latest").write_bytes(content)
    assert cli.main(arguments) == 0
    assert (
        f"{folder / 'latest'}: names no checkpoint" in caplog.text and f"resuming from {folder / NEWEST}" in caplog.text
    )


def test_a_state_of_another_version_is_refused_not_passed_over(copied, caplog):
    folder, arguments = copied
    state = folder / NEWEST / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 99}))
    files = {p.name: Checksum.of_file(p) for p in (folder / NEWEST).iterdir() if p.name != MANIFEST}
    (folder / NEWEST / MANIFEST).write_bytes(manifest(files))
    assert cli.main(arguments) == 2
    assert "format 99, this version reads 1" in caplog.records[-1].getMessage()
    assert f"--resume {folder / BEFORE}" in caplog.records[-1].getMessage()
