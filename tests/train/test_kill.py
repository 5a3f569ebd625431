"""kill -9 at random instants, also inside a save: the resumed losses are the uninterrupted run's, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.train.mixes import write_mix
from tests.train.processes import fork_server
from tests.train.test_validation import validations
from tinyllava_fast.train.cli import main

SHAPE = {
    "stages__pretrain__max_steps": 6,
    "stages__finetune__max_steps": 24,
    "checkpoint__every_steps": 2,
    "records": 60,
}


@pytest.fixture(scope="module")
def server():
    """Children fork from a process that has imported everything already, so that kills fall into the run itself."""
    return fork_server()


def start(server, path: Path, output: Path):
    child = server.Process(target=main, args=([str(path), f"output_dir={output}"],))
    child.start()
    return child


def kill(child) -> None:
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join()


def wait_for_steps(child, run: Path, more: int) -> None:
    """Until metrics.jsonl has grown by some lines; the last may be half written."""
    metrics = run / "metrics.jsonl"
    seen = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    while child.is_alive() and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= seen + more):
        time.sleep(0.001)


def wait_for_save(child, run: Path) -> None:
    """Until a checkpoint is being written."""
    while child.is_alive() and not any((run / "checkpoints").glob(".tmp-*")):
        time.sleep(0.0005)


def hunt(server, path: Path, run: Path, kills: int, seed: int) -> tuple[int, int]:
    """Start and kill until ``kills`` have hit, then let it finish; returns kills and kills inside a save."""
    rng, hits, in_save = random.Random(seed), 0, 0
    while hits < kills:
        child = start(server, path, run)
        wait_for_steps(child, run, rng.randint(1, 3))
        if hits % 2:
            time.sleep(rng.uniform(0, 0.1))
        else:
            wait_for_save(child, run)
            time.sleep(rng.uniform(0, 0.01))
        if not child.is_alive():
            child.join()
            break
        kill(child)
        hits += 1
        in_save += any((run / "checkpoints").glob(".tmp-*"))
    child = start(server, path, run)
    child.join(300)
    assert child.exitcode == 0
    return hits, in_save


def check(server, tiny_run, losses, kills: int, **changes) -> Path:
    """Compare a run that is killed with a whole one, in the folders run and whole beside the YAML that is returned."""
    path = tiny_run(**{**SHAPE, **changes})
    check_run(server, path, losses, kills)
    return path


def check_run(server, path: Path, losses, kills: int) -> None:
    whole, run = path.parent / "whole", path.parent / "run"
    child = start(server, path, whole)
    child.join(300)
    hits, in_save = hunt(server, path, run, kills, seed=kills)
    assert losses(run) == losses(whole)
    assert not list(run.glob("checkpoints/.tmp-*")) and not list(run.glob(".tmp-*"))
    final, twin = ((r / "final" / "model.safetensors").read_bytes() for r in (run, whole))
    assert final == twin
    assert hits == kills and in_save >= kills // 4
    return path


def test_workers_end_with_a_run_that_is_killed(server, tiny_run):
    path = tiny_run(**SHAPE | {"engine__workers": 2, "stages__finetune__max_steps": 4000})
    run = path.parent / "killed"
    child = start(server, path, run)
    try:
        wait_for_steps(child, run, 12)  # well into the second stage
        workers = psutil.Process(child.pid).children()
    finally:
        kill(child)
    assert len(workers) >= 2, [p.name() for p in workers]
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def test_three_kills(server, tiny_run, losses):
    check(server, tiny_run, losses, 3)


def by_source(run: Path) -> list[object]:
    return [json.loads(line).get("sources") for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_kills_of_a_mix_change_no_loss_of_a_source(server, tmp_path, losses):
    path = write_mix(tmp_path, stages=2, **SHAPE, log_every=3, engine__workers=1)
    check_run(server, path, losses, 4)
    assert by_source(tmp_path / "run") == by_source(tmp_path / "whole")


@pytest.mark.slow
def test_twenty_kills(server, tiny_run, losses):
    check(server, tiny_run, losses, 20, stages__finetune__max_steps=300)


def test_kills_do_not_change_validations_best_models_or_an_early_end(server, tiny_run, losses):
    validation = {"share": 0.3, "every_steps": 2, "keep": "best", "patience": 4, "samples": 2, "max_new_tokens": 3}
    changes = {"stages__finetune__validation": validation, "stages__finetune__optim__lr": 0.03, "log_every": 3}
    path = check(server, tiny_run, losses, 3, **changes)
    found, expected = (validations(path.parent / name) for name in ("run", "whole"))
    assert found == expected and len(found) > 4
    best, twin = ((path.parent / name / "last" / "finetune" / "model.safetensors") for name in ("run", "whole"))
    assert best.read_bytes() == twin.read_bytes()
