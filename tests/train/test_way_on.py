"""The advice of a run that stops: done by the real command, it goes on and ends as the run that nothing disturbed."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.train.conftest import prepare
from tests.train.test_resume import run_cli
from tinyllava_fast.config import schema
from tinyllava_fast.errors import UserError
from tinyllava_fast.models import io
from tinyllava_fast.train import cli, loop, run
from tinyllava_fast.train.checkpoint import CheckpointStore
from tinyllava_fast.train.failures import Way

SHORT = {"stages__pretrain__max_steps": 2, "stages__finetune__max_steps": 4}
SKIP = [f"stages.{name}.data.on_bad_image=skip" for name in ("pretrain", "finetune")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a finished run of 2 and 4 steps: its YAML, data and ``run``. Read only."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_cli(prepare(folder, **SHORT)) == 0
    return folder


@pytest.fixture
def said(caplog):
    """The last warning or error."""
    return lambda: [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")][-1]


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, do): a context in which ``do`` is called at the end of step n."""

    @contextmanager
    def inside(step, do):
        advance = loop.Stage._advance

        def stepping(stage, *arguments):
            advance(stage, *arguments)
            if stage.state.step == step:
                do()

        with monkeypatch.context() as patch:
            patch.setattr(loop.Stage, "_advance", stepping)
            yield

    return inside


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def resume_of(text: str) -> str:
    """The path that a message names behind --resume."""
    found = re.search(r"--resume (/\S+?)[;.,]?(?:\s|$)", text)
    assert found, text
    return found[1]


@pytest.mark.parametrize("stop", ["signal", "error"])
def test_after_resume_never_the_advice_does_not_start_over(whole, tmp_path, losses, said, at_step, stop):
    path, output = whole / "run.yaml", f"output_dir={tmp_path / 'run'}"
    do = out_of_memory if stop == "error" else lambda: signal.raise_signal(signal.SIGTERM)
    with at_step(4, do):
        assert run_cli(path, output, "--resume", "never") == (1 if stop == "error" else 143)
    assert "the same command with --resume auto" in said()
    step = 3 if stop == "error" else 4
    assert str(tmp_path / "run" / "checkpoints" / f"finetune-0000000{step}") in said()
    assert run_cli(path, output, "--resume", "auto") == 0
    assert losses(tmp_path / "run") == losses(whole / "run")


def test_after_resume_from_another_run_the_advice_goes_on_from_the_newest(whole, tmp_path, losses, said, at_step):
    path, output = whole / "run.yaml", f"output_dir={tmp_path / 'run'}"
    start = ["--resume", str(whole / "run" / "checkpoints" / "finetune-00000003")]
    with at_step(4, out_of_memory):
        assert run_cli(path, output, *start) == 1
    assert f"{start[1]} is intact: the same command, with" in said()
    with at_step(5, out_of_memory):
        assert run_cli(path, output, *start) == 1
    assert "finetune-00000004 is intact: the same command with --resume auto, with what is mended, goes on" in said()
    assert run_cli(path, output, "--resume", "auto") == 0
    assert losses(tmp_path / "run") == losses(whole / "run")[3:]


@pytest.mark.parametrize("arguments", [[], ["--resume", "never"]])
def test_a_signal_before_the_first_checkpoint_promises_none(whole, tmp_path, monkeypatch, said, arguments):
    monkeypatch.setattr(run, "build_tokenizer", lambda _: signal.raise_signal(signal.SIGTERM))
    assert run_cli(whole / "run.yaml", f"output_dir={tmp_path / 'run'}", *arguments) == 143
    assert said() == "stopped before the first checkpoint; the same command starts over"


def test_a_signal_passes_code_that_turns_errors_into_others(whole, tmp_path, monkeypatch, said):
    def broad(_: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception as error:
            raise UserError("this tokenizer cannot be used") from error

    monkeypatch.setattr(run, "build_tokenizer", broad)
    assert run_cli(whole / "run.yaml", f"output_dir={tmp_path / 'run'}") == 143
    assert said() == "stopped before the first checkpoint; the same command starts over"


def test_a_terminal_that_closes_saves(whole, tmp_path, losses, said, at_step):
    path, output = whole / "run.yaml", f"output_dir={tmp_path / 'run'}"
    with at_step(4, lambda: signal.raise_signal(signal.SIGHUP)):
        assert run_cli(path, output, "checkpoint.every_steps=0") == 129
    assert said().endswith("finetune-00000004")
    assert run_cli(path, output) == 0
    assert losses(tmp_path / "run") == losses(whole / "run")


def test_nohup_stays_deaf_to_the_terminal(whole, tmp_path, at_step):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with at_step(4, lambda: signal.raise_signal(signal.SIGHUP)):
            assert run_cli(whole / "run.yaml", f"output_dir={tmp_path / 'run'}") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_diverged_run_names_the_rates_in_use_and_a_checkpoint_before_the_harm(tiny_run, losses, said):
    path = tiny_run(**SHORT)
    wild = ["stages.finetune.recipe.connector.lr=1e30", "stages.finetune.optim.clip_norm=0"]
    assert run_cli(path, *wild) == 2
    for key in ("optim.lr", "recipe.connector.lr", "recipe.vision.lr"):
        assert f"stages.finetune.{key}" in said()
    assert "recipe.llm.lr" not in said()
    calm = ["stages.finetune.recipe.connector.lr=3e-3", wild[1]]
    assert run_cli(path, *calm) == 2, "the weights of that checkpoint are spoilt already"
    back = resume_of(said())
    assert run_cli(path, *calm, "--resume", back) == 0
    other = path.parent / "other"
    assert run_cli(path, *calm, f"output_dir={other}") == 0
    assert losses(path.parent / "run") == losses(other)


def test_a_full_disk_names_the_whole_command_for_another_folder(whole, tmp_path, losses, monkeypatch, said):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    path, other = whole / "run.yaml", tmp_path / "other"
    with monkeypatch.context() as patch:
        patch.setattr(io, "save_file", full)
        assert run_cli(path, f"output_dir={tmp_path / 'run'}") == 1
    assert "to go on in another output_dir, add --resume" in said()
    assert run_cli(path, f"output_dir={other}", "--resume", resume_of(said())) == 0
    assert losses(other) == losses(whole / "run")[2:]
    final, twin = ((r / "final" / "model.safetensors").read_bytes() for r in (other, whole / "run"))
    assert final == twin


@pytest.mark.parametrize("choice", [[], SKIP])
def test_pictures_that_go_away_stop_the_run_even_with_skip(tiny_run, losses, said, at_step, choice):
    path = tiny_run(**SHORT)
    images, away = path.parent / "images", path.parent / "away"
    with at_step(3, lambda: images.rename(away)):
        assert run_cli(path, *choice) == 2
    assert "image file is missing; put it back" in said()
    away.rename(images)
    assert run_cli(path, *choice) == 0
    assert run_cli(path, *choice, f"output_dir={path.parent / 'twin'}") == 0
    assert losses(path.parent / "run") == losses(path.parent / "twin")


def test_tiles_of_a_picture_without_a_header(tiny_run, losses, said, at_step):
    keys = {"data__image_mode": "anyres", "batch__tokens": 200, "batch__max_images": 12}
    path = tiny_run(**SHORT, **{f"stages__{s}__{k}": v for s in ("pretrain", "finetune") for k, v in keys.items()})
    good = {file: file.read_bytes() for file in (path.parent / "images").iterdir()}
    with at_step(1, lambda: [file.write_bytes(b"") for file in good]):
        assert run_cli(path) == 2
    assert run_cli(path, *SKIP) == 2
    assert "image_mode=anyres takes the number of tokens from their headers" in said() and "0.png" in said()
    for file, content in good.items():
        file.write_bytes(content)
    assert run_cli(path, *SKIP) == 0
    assert run_cli(path, f"output_dir={path.parent / 'twin'}") == 0
    assert losses(path.parent / "run") == losses(path.parent / "twin")


def test_a_way_on_whose_checkpoint_was_removed(tmp_path):
    store = CheckpointStore(tmp_path, 9)
    way = Way(store, "auto", saved=tmp_path / "a-00000002")
    assert way.newest is None and way.older() is None and way.command() == "the same command"
    for number, name in enumerate(("a-00000001", "a-00000002", "a-00000003")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
        os.utime(tmp_path / name / "state.json", (number, number))
    assert way.newest == tmp_path / "a-00000002"
    assert Way(store, "never").newest is None


def test_a_stage_name_with_a_dot_or_an_equals_sign_is_addressed_as_errors_write_it(tiny_run, said):
    path = tiny_run(**SHORT, stages__pretrain__name="v1.5", stages__finetune__name="lr=1e-3")
    for picture in (path.parent / "images").iterdir():
        if picture.stem != "0":
            picture.write_bytes(picture.read_bytes()[:45])
    assert run_cli(path) == 2
    skip = [f"stages.{name}.data.on_bad_image=skip" for name in ("v1.5", "lr=1e-3")]
    assert f"set {skip[0]}" in said()
    assert run_cli(path, skip[0]) == 2
    assert f"set {skip[1]}" in said() and "stages.v1.5" not in said().partition("\n")[0]
    assert run_cli(path, *skip) == 0


@pytest.mark.parametrize("name", ["final", "summary.json", "checkpoints/latest", "checkpoints/finetune-00000099"])
def test_resume_from_what_is_no_checkpoint_names_the_run_folder(whole, tmp_path, said, name):
    output = f"output_dir={tmp_path / 'run'}"
    assert run_cli(whole / "run.yaml", output, "--resume", str(whole / "run" / name)) == 2
    assert f"{whole / 'run' / name}: not a checkpoint" in said() and resume_of(said()) == str(whole / "run")
    assert run_cli(whole / "run.yaml", output, "--resume", resume_of(said())) == 0


GROUP = """
import sys
from tinyllava_fast.train.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP))]
)
def test_a_signal_to_the_whole_process_group_spares_the_data_workers(whole, tmp_path, losses, number):
    path, folder = whole / "run.yaml", tmp_path / "run"
    command = [str(path), f"output_dir={folder}", "engine.workers=2", "stages.finetune.max_steps=2000"]
    with subprocess.Popen(
        [sys.executable, "-c", GROUP, *command], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        try:
            while child.poll() is None and not (folder / "metrics.jsonl").exists():
                time.sleep(0.01)
            while child.poll() is None and len(losses(folder)) < 5:
                time.sleep(0.01)
            os.killpg(child.pid, number)
            _, text = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 128 + number, text
    assert "stopped; the same command goes on from" in text and "Traceback" not in text and "killed" not in text
    assert cli.main([str(path), f"output_dir={folder}", f"stages.finetune.max_steps={len(losses(folder)) - 1}"]) == 0


_INERT = {
    schema.RunConfig: "output_dir data_root plugins seed model stages engine checkpoint log_every loggers",
    schema.ModelConfig: "path llm vision connector",
    schema.LLMConfig: "type path gguf_file config tokenizer options",
    schema.VisionConfig: "type path config feature_layer feature_select image_mean image_std options",
    schema.ConnectorConfig: "type path options",
    schema.StageConfig: "name data recipe optim batch validation epochs max_steps",
    schema.ValidationConfig: "records image_folder share every_steps max_packs samples max_new_tokens benchmarks "
    "metric keep patience",
    schema.DataConfig: "records image_folder sources stream shuffle_buffer template turns masks turns_per_sample "
    "image_mode image_grid orientation background augment feature_cache on_error on_bad_image overlong max_tokens",
    schema.AugmentConfig: "hflip vflip shift keep_inside scale rotate",
    schema.BatchConfig: "tokens max_segments max_images image_multiple packs_per_step lookahead",
    schema.RecipeConfig: "type llm vision connector options",
    schema.TuneConfig: "tune from_layer lr layer_decay lora quant double_quant",
    schema.LoRAConfig: "r alpha dropout bias target_modules rslora dora rank_pattern alpha_pattern b_lr_ratio",
    schema.OptimConfig: "type lr betas eps weight_decay clip_norm schedule warmup_ratio min_lr_ratio decay_ratio ema "
    "noise_scale label_smoothing z_loss options on_nonfinite most_skipped_in_a_row most_skipped",
    schema.EngineConfig: "type device dtype compile cuda_graphs gradient_checkpointing zero_stage offload deepspeed "
    "threads workers prefetch silence_timeout",
    schema.CheckpointConfig: "every_steps keep asynchronous",
}


@pytest.mark.parametrize("section", _INERT, ids=lambda s: s.__name__)
def test_a_new_key_is_added_with_a_thought_for_the_checkpoints_that_lack_it(section):
    """A run that resumes gets the default of a key that its checkpoint does not have (train/resume.py).

    So the default must be what runs did before there was the key; else give None, and let the state tell what the run
    began with, as data.orientation does. Add the key here once that is so.
    """
    assert list(section.__dataclass_fields__) == _INERT[section].split()
