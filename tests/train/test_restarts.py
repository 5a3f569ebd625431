"""tlf-train --nproc: torchrun's agent starts the processes, and starts them again from the last checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.train.processes import Ranks, fork_server
from tests.train.test_faults import SILENCE, wait_for_step
from tinyllava_fast.train import cli

SHAPE = {
    "engine__type": "ddp",
    "stages__pretrain__max_steps": 2,
    "stages__finetune__max_steps": 40,
    "checkpoint__every_steps": 2,
}


def start(path: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tinyllava_fast.train.cli", str(path), "--nproc", "2", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def process_of(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process that trains as a rank."""
    children = psutil.Process(launcher.pid).children()
    return next(child for child in children if child.environ().get("RANK") == str(rank))


@pytest.mark.slow
def test_a_killed_process_is_started_again_by_itself(tiny_run, losses, tmp_path):
    path = tiny_run(**SHAPE)
    whole, run = tmp_path / "whole", path.parent / "run"
    with Ranks(fork_server(), tmp_path / "said", [str(path), f"output_dir={whole}"]) as ranks:
        assert ranks.wait() == [0, 0]
    launcher = start(path, "--max-restarts", "3")
    try:
        for rank, step in ((0, 7), (1, 16)):
            wait_for_step(run, step)
            process_of(launcher, rank).kill()
        said = launcher.communicate(timeout=300)[1]
    finally:
        launcher.kill()
    assert launcher.returncode == 0, said
    assert "rank 0 (process" in said and "rank 1 (process" in said and "was killed" in said
    assert said.count("resuming from") == 2 and "Traceback" not in said
    assert losses(run) == losses(whole)
    final = [folder / "final" / "model.safetensors" for folder in (run, whole)]
    assert final[0].read_bytes() == final[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 0)])
@pytest.mark.parametrize("receiver", ["launcher", "rank 1"])
def test_a_signal_saves_and_ends_within_seconds(tiny_run, receiver, number, code):
    path = tiny_run(**SHAPE | {"stages__finetune__max_steps": 4000, "checkpoint__every_steps": 0})
    launcher = start(path, "--max-restarts", "2")
    try:
        wait_for_step(path.parent / "run", 5)
        os.kill(launcher.pid if receiver == "launcher" else process_of(launcher, 1).pid, number)
        began = time.monotonic()
        said = launcher.communicate(timeout=60)[1]
    finally:
        launcher.kill()
    assert launcher.returncode == code and time.monotonic() - began < 15, said
    assert "stopped; the same command goes on from" in said and "Traceback" not in said and "restart 1" not in said


@pytest.mark.slow
def test_a_stopped_process_is_killed_and_all_start_again_but_not_after_a_refusal(tiny_run, losses, tmp_path):
    path = tiny_run(**SHAPE | {"engine__silence_timeout": SILENCE})
    whole, run = tmp_path / "whole", path.parent / "run"
    with Ranks(fork_server(), tmp_path / "said", [str(path), f"output_dir={whole}"]) as ranks:
        assert ranks.wait() == [0, 0]
    launcher = start(path, "--max-restarts", "3")
    try:
        wait_for_step(run, 7)
        process_of(launcher, 1).suspend()
        said = launcher.communicate(timeout=120)[1]
    finally:
        launcher.kill()
    assert launcher.returncode == 0, said
    assert "rank 1 (process" in said and f"is stopped: it has not run for {SILENCE} s" in said
    assert said.count("resuming from") == 1 and "restart 1 of 3" in said and "Traceback" not in said
    assert losses(run) == losses(whole)
    launcher = start(path, "--max-restarts", "3", "seed=7")
    said = launcher.communicate(timeout=120)[1]
    assert launcher.returncode == 2 and "seed: checkpoint 0, now 7" in said and "restart" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nproc", "2"], "engine.type: torch runs one process, but 2 were started; set engine.type=ddp"),
        (["--nproc=0"], "--nproc: expected a whole number of at least 1, got '0'"),
        (["--nproc"], "--nproc: expected a whole number of at least 1, got ''"),
        (["--max-restarts", "3"], "--max-restarts: needs --nproc N"),
    ],
)
def test_a_mistake_starts_no_process(tiny_run, caplog, arguments, said):
    assert cli.main([str(tiny_run()), *arguments]) == 2
    assert said in caplog.text
