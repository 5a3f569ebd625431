"""tlf-train status: right for a run that prepares, runs, stalls, has finished, was stopped, diverged or was killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tinyllava_fast.train import cli, status
from tinyllava_fast.train.pulse import FILE, LOCK, Heart
from tinyllava_fast.train.status import lock_holder, read_status

TinyRun = Callable[..., Path]
LONG = {"stages__finetune__max_steps": 100_000, "checkpoint__every_steps": 500, "log_every": 5}


@contextmanager
def running(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A training in a process of its own, well into its second stage."""
    run = path.parent / "run"
    command = [sys.executable, "-m", "tinyllava_fast.train.cli", str(path)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while child.poll() is None and not trains(run, child.pid):
            time.sleep(0.05)
        assert child.poll() is None
        yield child
    finally:
        child.kill()
        child.wait()


def trains(run: Path, pid: int) -> bool:
    """Whether the process is between two steps of the second stage, behind a checkpoint of it."""
    if not (run / FILE).is_file() or not list((run / "checkpoints").glob("finetune-*/state.json")):
        return False
    pulse = json.loads((run / FILE).read_text())
    return bool(pulse["pid"] == pid and pulse["stage"] == "finetune" and not pulse["doing"])


def ask(capsys: Any, *arguments: str) -> tuple[int, str]:
    code = cli.main(["status", *arguments])
    return code, capsys.readouterr().out


def test_a_run_that_is_alive_stalls_stops_and_is_killed(tiny_run: TinyRun, capsys: Any, monkeypatch: Any) -> None:
    path = tiny_run(**LONG)
    run = str(path.parent / "run")
    with running(path) as child:
        assert lock_holder(Path(run) / ".lock") == child.pid
        code, said = ask(capsys, run)
        assert code == 0 and f"alive (process {child.pid})" in said and "stage finetune, step" in said, said
        assert "to the end of the run" in said and re.search(r"loss: \d\.\d{4} \(step \d+\)", said)
        monkeypatch.setattr(status, "PATIENCE_S", 0.5)
        monkeypatch.setattr(status, "PATIENCE_STEPS", 0)
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(1)
        found = read_status(run)
        assert found.state == "stalled" and "no step for" in found.said, str(found)
        os.kill(child.pid, signal.SIGCONT)
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait(60) == 143
    code, said = ask(capsys, run)
    assert code == 1 and "stopped by a signal" in said and "the same command goes on from" in said
    with running(path) as child:
        child.kill()
        child.wait()
        code, said = ask(capsys, run)
        assert code == 1 and "dead: its process" in said and "kill -9" in said and "newest checkpoint" in said
    code, text = ask(capsys, run, "--json")
    told = json.loads(text)
    assert code == 1 and told["state"] == "dead" and told["pid"] is None and told["checkpoint"].startswith(run)


def test_a_finished_run_by_folder_and_by_configuration(tiny_run: TinyRun, capsys: Any) -> None:
    path = tiny_run(stages__finetune__validation={"share": 0.3, "every_steps": 4, "samples": 1, "max_new_tokens": 2})
    assert cli.main([str(path)]) == 0
    capsys.readouterr()
    for asked in (str(path.parent / "run"), str(path)):
        code, said = ask(capsys, asked)
        assert code == 0 and "finished" in said and "step 8 of 8 (run: step 12)" in said
        assert re.search(r"best: step \d+, validation loss \d\.\d{4}", said) and "newest checkpoint" not in said
    code = (
        "import sys; from tinyllava_fast.train.status import read_status; assert read_status(sys.argv[1]).well;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(path.parent / "run")], check=True)  # it answers at once
    page = (path.parent / "run" / "index.html").read_text()
    assert "finished" in page and "http-equiv" not in page and "Validation loss" in page
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page


def test_a_diverged_run_says_why(tiny_run: TinyRun, capsys: Any) -> None:
    path = tiny_run(stages__finetune__optim={"lr": 1e30, "clip_norm": 0, "warmup_ratio": 0})
    assert cli.main([str(path)]) == 2
    code, said = ask(capsys, str(path.parent / "run"))
    assert code == 1 and "the training diverged" in said and "lower stages.finetune.optim.lr" in said
    assert "diverged" in (path.parent / "run" / "index.html").read_text()


def test_an_error_is_told_and_a_mistake_before_the_start_leaves_no_folder(tiny_run: TinyRun, capsys: Any) -> None:
    path = tiny_run()
    deep = path.parent / "a" / "b"
    assert cli.main([str(path), f"output_dir={deep}", "stages.finetune.data.records=nowhere.json"]) == 2
    assert not deep.parent.exists()
    deep.mkdir(parents=True)
    assert cli.main([str(path), f"output_dir={deep}", "stages.finetune.data.records=nowhere.json"]) == 2
    assert deep.is_dir() and list(deep.iterdir()) == [deep / ".lock"]


def test_a_folder_that_prepares(tmp_path: Path) -> None:
    """The lock is held, and status.json is of an earlier process or missing."""
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True);"
        "time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".lock")], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"held\n"
        assert read_status(tmp_path).state == "preparing"
    finally:
        child.kill()
        child.wait()
    (tmp_path / FILE).write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "stage": "a", "loss": 2.5}\n{"step": 4, "st')
    assert (found := read_status(tmp_path)).state == "unknown" and found.loss == 2.5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "no such run folder"),
        ([], "takes one run folder, got 0"),
        (["a", "b"], "takes one run folder, got 2"),
        (["a", "--jso"], "did you mean --json"),
    ],
    ids=["no folder", "none", "two", "flag"],
)
def test_mistakes_are_sentences(arguments: list[str], said: str, caplog: Any) -> None:
    assert cli.main(["status", *arguments]) == 2
    assert said in caplog.text


def test_a_configuration_called_status_is_still_trained(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "status").write_text("stages: []\n")
    assert cli.main(["./status"]) == 2
    assert "status: stages: empty; a run needs at least one stage" in caplog.text


def seen_from_elsewhere(run: Path, **changes: object) -> str:
    """Let the run be one of another container; return what is said of it."""
    pulse = json.loads((run / FILE).read_text()) | {"pids": "pid:[1]", "host": "box"} | changes
    (run / FILE).write_text(json.dumps(pulse))
    return str(read_status(run))


def test_a_run_in_a_container_is_judged_by_its_heartbeat(tmp_path: Path) -> None:
    """Its process number means nothing here, and its lock may not show."""
    Heart(tmp_path).beat(stage="s", stage_step=3, stage_steps=9, step=3, step_s=0.5, eta_s=3)
    (tmp_path / LOCK).write_text("")
    now = time.time()
    assert read_status(tmp_path).state == "dead"  # here, without a lock
    said = seen_from_elsewhere(tmp_path)
    assert "alive (process" in said and "on box, which cannot be seen from here, by its heartbeat)" in said
    assert "stalled" in seen_from_elsewhere(tmp_path, updated=now - 300)
    said = seen_from_elsewhere(tmp_path, updated=now - 3000)
    assert "dead, or out of reach" in said and "ask on box" in said and read_status(tmp_path).state == "dead"
    doing = seen_from_elsewhere(tmp_path, doing="validating", doing_since=now - 300, updated=now - 300)
    assert "alive" in doing and "validating for 5:00" in doing


def test_the_lock_of_a_container_is_its_pulse_s_whatever_its_number_here(tmp_path: Path) -> None:
    Heart(tmp_path).beat(stage="s", stage_step=3, stage_steps=9, step=3, step_s=0.5, eta_s=3)
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True);"
        "time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / LOCK)], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"held\n"
        assert read_status(tmp_path).state == "preparing"  # another process of this machine holds it
        seen_from_elsewhere(tmp_path, pid=7)
        pulse = json.loads((tmp_path / FILE).read_text())
        holder = {key: pulse[key] for key in ("pid", "boot", "pids")}
        (tmp_path / LOCK).write_text(json.dumps(holder))
        assert "alive (process 7 on box, which cannot be seen from here)" in str(read_status(tmp_path))
        (tmp_path / LOCK).write_text(json.dumps(holder | {"pid": 8}))
        assert read_status(tmp_path).state == "preparing"  # one that follows it
    finally:
        child.kill()
        child.wait()
