"""Runs that cannot write, have nothing to learn, or are told to stop while they start."""

from __future__ import annotations

import errno
import io
import json
import shutil
import signal
from pathlib import Path

import pytest
from PIL import Image

from tinyllava_fast.train import cli, loop, metrics, prepare, run, stage
from tinyllava_fast.train.checkpoint import damage
from tinyllava_fast.train.loggers import tensorboard


def errors(caplog) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.levelname == "ERROR")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("{}/run.yaml", "is a file; name a folder"),
        ("{}/run.yaml/run", "a part of that path is a file"),
        ("/proc/nope/run", "cannot be written"),
        ("{}/" + "x" * 300, "shorten the name"),
    ],
)
def test_a_folder_that_cannot_be_made_is_a_sentence(tiny_run, caplog, output, reason):
    path = tiny_run()
    output = output.format(path.parent)
    assert cli.main([str(path), f"output_dir={output}"]) == 2
    assert output.removesuffix("/run") in errors(caplog) and reason in errors(caplog)


def test_a_file_in_the_place_of_the_checkpoints_is_found_before_the_first_step(tiny_run, losses, caplog):
    path = tiny_run()
    (path.parent / "run").mkdir()
    (path.parent / "run" / "checkpoints").write_text("mine")
    assert cli.main([str(path)]) == 2
    assert f"{path.parent / 'run' / 'checkpoints'}: cannot be written: File exists" in errors(caplog)
    assert (path.parent / "run" / "checkpoints").read_text() == "mine"
    assert not (path.parent / "run" / "metrics.jsonl").exists()


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("file", ["config.yaml", "summary.json", "metrics.jsonl", "tensorboard", "model"])
def test_a_full_disk_is_a_sentence_and_the_same_command_goes_on(tiny_run, losses, monkeypatch, caplog, file):
    path = tiny_run(stages__pretrain__max_steps=2, stages__finetune__max_steps=2, checkpoint__every_steps=1)
    folder, write = path.parent / "run", run.write_file
    with monkeypatch.context() as patch:
        if file in ("config.yaml", "summary.json"):
            patch.setattr(run, "write_file", lambda p, b: full() if p.name == file else write(p, b))
        elif file == "tensorboard":
            patch.setattr(tensorboard, "_open", full)
        elif file == "model":
            patch.setattr("tinyllava_fast.models.io.save_file", full)
        else:
            patch.setattr(metrics.os, "fsync", full)
        assert cli.main([str(path)]) == 1
    said = errors(caplog)
    assert "No space left on device" in said and "ree some space" in said
    whole = path.parent / "whole"
    assert cli.main([str(path)]) == 0 and cli.main([str(path), f"output_dir={whole}"]) == 0
    assert losses(folder) == losses(whole)
    assert (folder / "summary.json").is_file() and (folder / "final" / "model.safetensors").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_metrics_on_a_device_without_space(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(metrics.UserError, match=r"metrics\.jsonl: cannot be written: No space left.*free some space"):
        metrics.MetricsWriter(tmp_path).write({"step": 1, "stage": "s", "loss": 1.0})


@pytest.mark.parametrize("name", ["", "metrics.jsonl", "tensorboard", "checkpoints"])
def test_a_folder_that_is_removed_while_it_trains(tiny_run, monkeypatch, caplog, name):
    path = tiny_run(stages__pretrain__max_steps=4, stages__finetune__max_steps=2, checkpoint__every_steps=1)
    folder, advance = path.parent / "run", loop.Stage._advance

    def removing(stage, *arguments):
        advance(stage, *arguments)
        if stage.state.step == 2:
            target = folder / name
            shutil.rmtree(target) if target.is_dir() else target.unlink()

    with monkeypatch.context() as patch:
        patch.setattr(loop.Stage, "_advance", removing)
        code = cli.main([str(path)])
    if name in ("", "metrics.jsonl"):
        assert code == 2 and "has been removed while this run writes to it" in errors(caplog)
    else:
        assert code in (0, 2) and ("cannot be written" in errors(caplog)) == (code == 2)
    assert cli.main([str(path)]) == 0


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (220, 40, 40)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = _png()


def break_pictures(folder: Path) -> None:
    for picture in (folder / "images").iterdir():
        picture.write_bytes(picture.read_bytes()[:45])


@pytest.mark.parametrize("steps", [None, 2, 30])
def test_every_picture_damaged_and_skipped_is_refused(tiny_run, losses, monkeypatch, caplog, steps):
    """Damaged once the run has begun; what is damaged before is found by the data set."""
    skip = {f"stages__{name}__data__on_bad_image": "skip" for name in ("pretrain", "finetune")}
    path = tiny_run(stages__pretrain__max_steps=steps, records=12, **skip)
    rows = [row for row in json.loads((path.parent / "records.json").read_text()) if "image" in row]
    (path.parent / "records.json").write_text(json.dumps(rows))
    begin = run.Run.open
    monkeypatch.setattr(run.Run, "open", lambda self: (begin(self), break_pictures(path.parent)))
    assert cli.main([str(path)]) == 2
    said = errors(caplog)
    assert "had no supervised token" in said and ".png" in said and "records were skipped, the first:" in said
    assert not (path.parent / "run" / "pretrain").exists()
    assert len(losses(path.parent / "run")) == (2 if steps == 2 else 3)  # 9 records are 5 packs, 2 a step


def test_a_step_in_which_all_is_skipped_is_a_warning(tiny_run, losses, caplog):
    skip = {f"stages__{name}__data__on_bad_image": "skip" for name in ("pretrain", "finetune")}
    path = tiny_run(records=12, stages__pretrain__batch__packs_per_step=1, **skip)
    rows = [row for row in json.loads((path.parent / "records.json").read_text()) if "image" in row]
    (path.parent / "records.json").write_text(json.dumps(rows))
    break_pictures(path.parent)
    for row in rows[:4]:
        (path.parent / "images" / row["image"]).write_bytes(PNG)
    assert cli.main([str(path)]) == 0
    assert "no supervised token in it, so nothing is learnt from it" in caplog.text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", ["start", "look_ahead", "data", "model folder", "end"])
def test_a_signal_between_the_steps_stops_at_once(tiny_run, losses, monkeypatch, number, code, moment):
    path = tiny_run(stages__pretrain__max_steps=2, stages__finetune__max_steps=2)
    places = {
        "start": (run, "build_tokenizer"),
        "look_ahead": (prepare, "check_recipe"),
        "data": (stage, "build_loader"),
        "model folder": (loop.io, "save_model"),
        "end": (run, "copy_model"),
    }
    owner, name = places[moment]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *_, **__: signal.raise_signal(number))
        assert cli.main([str(path)]) == code
    assert cli.main([str(path)]) == 0
    assert [step for step, *_ in losses(path.parent / "run")] == [1, 2, 3, 4]


def test_a_damaged_state_leads_back_to_an_older_checkpoint(tiny_run, losses, caplog):
    path = tiny_run(stages__pretrain__max_steps=2, stages__finetune__max_steps=2, checkpoint__every_steps=1)
    folder = path.parent / "run"
    assert cli.main([str(path)]) == 0
    lines = losses(folder)
    newest = folder / "checkpoints" / "finetune-00000004"
    state, before = json.loads((newest / "state.json").read_text()), newest.with_name("finetune-00000003")
    del state["checksums"]  # as a checkpoint from before there were any
    (newest / "checksums.json").unlink()
    for damaged in DAMAGED(state):
        (newest / "state.json").write_bytes(damaged)
        assert damage(newest)
    caplog.clear()
    assert cli.main([str(path)]) == 0
    assert f"{newest / 'state.json'}" in caplog.text and f"resuming from {before}" in caplog.text
    assert losses(folder) == lines


def DAMAGED(state: dict) -> list[bytes]:
    """state.json cut, emptied, of other kinds, field by field."""
    text = json.dumps(state).encode()
    found = [b"", b"[]", b"null", text[: len(text) // 2], b"\xff" + text, text.replace(b'"step"', b'"stp"')]
    for name in ("stage", "stage_index", "stage_step", "step", "loader", "totals", "reports", "config", "format"):
        found += [json.dumps({**state, name: bad}).encode() for bad in (None, [1], -1)]
        found.append(json.dumps({k: v for k, v in state.items() if k != name}).encode())
    found.append(json.dumps({**state, "loader": {**state["loader"], "pack": "3"}}).encode())
    return found
