"""Parent and worker over pipes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinyllava_fast.bench.gate import Gate, Worker
from tinyllava_fast.errors import UserError

ECHO = """
import sys
from tinyllava_fast.bench.gate import Gate
gate = Gate(sys.stdin, sys.stdout)
gate.ready({"name": sys.argv[1]})
step = 0
try:
    while True:
        gate.begin()
        step += 1
        if step == 5:
            raise SystemExit("out of packs")
        gate.end(float(step))
except EOFError:
    pass
"""


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "echo_worker.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_steps_run_on_order(echo: Path) -> None:
    worker = Worker("ours", "echo_worker", ["x"], echo / "log")
    try:
        assert worker.ready() == {"name": "x"}
        assert worker.steps(1)["losses"] == [1.0]
        answer = worker.steps(2)
        assert answer["losses"] == [2.0, 3.0] and len(answer["seconds"]) == 2
        assert answer["peak_rss_bytes"] > 1 << 20
    finally:
        worker.close()


def test_a_dead_worker_is_reported_with_its_last_words(echo: Path) -> None:
    worker = Worker("peer", "echo_worker", ["x"], echo / "log")
    try:
        worker.ready()
        worker.steps(4)
        with pytest.raises(UserError, match=r"peer process .* code 1:\n  out of packs"):
            worker.steps(1)
        with pytest.raises(UserError, match="peer process"):
            worker.steps(1)
    finally:
        worker.close()


def test_the_clock_runs_between_begin_and_end_only() -> None:
    answers, waits = io.StringIO(), []
    gate = Gate(io.StringIO('{"steps": 2}\n'), answers, sync=lambda: waits.append(1))
    gate.begin()
    gate.end(1.0)
    time.sleep(0.05)
    gate.begin()
    gate.end(2.0)
    said = json.loads(answers.getvalue())
    assert said["losses"] == [1.0, 2.0] and max(said["seconds"]) < 0.05 and len(waits) == 4
    with pytest.raises(EOFError):
        gate.begin()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_peak_memory_counts_from_the_reset() -> None:
    code = (
        "from tinyllava_fast.hardware import peak_rss_bytes, reset_peak_rss\n"
        "block = bytearray(64 << 20); high = peak_rss_bytes(); del block; reset_peak_rss()\n"
        "assert peak_rss_bytes() < high - (32 << 20)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # a process of its own: malloc may be told to keep memory
