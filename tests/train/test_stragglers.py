"""The processes' own times: what a line says of them, and the warning that names a slow one."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train.processes import Ranks, fork_server
from tinyllava_fast.train.engine.torch_engine import TorchEngine
from tinyllava_fast.train.status import read_status
from tinyllava_fast.train.stragglers import PATIENCE, Stragglers


def watched(monkeypatch: pytest.MonkeyPatch, rank: int = 0) -> Stragglers:
    monkeypatch.setattr("tinyllava_fast.group.gather", lambda item: [f"{item}-{n}" for n in range(3)])
    monkeypatch.setattr("socket.gethostname", lambda: "node")
    return Stragglers(rank, lambda table: table, torch.device("cpu"))


def test_a_line_says_how_even_the_processes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found = watched(monkeypatch).judge(np.array([[1.0, 1.0, 2.0], [2.0, 1.0, 1.0]]))
    assert (found["idle_share"], found["imbalance"]) == (pytest.approx(1 / 3), pytest.approx(9 / 8))
    assert (found["slowest"], found["own_s"]) == (0, pytest.approx(4 / 3))


def test_a_table_has_this_process_s_times_in_its_column(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(monkeypatch, rank=1).settle([0.5, 0.25]).tolist() == [[0, 0.5, 0], [0, 0.25, 0]]


def test_a_process_that_stays_slow_is_named_once(monkeypatch, caplog) -> None:
    stragglers = watched(monkeypatch)
    slow, even = np.array([[1.0, 1.3, 1.0]]), np.array([[1.0, 1.1, 1.0]])
    for seconds in (*[slow] * (PATIENCE - 1), even, *[slow] * 2 * PATIENCE):
        stragglers.judge(seconds)
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 1 and named[0].startswith(
        "rank 1 on node-1 is slow: 1.30 s a step for its own part, 1.3 times"
    )
    watched(monkeypatch, rank=2).judge(slow)
    assert len(caplog.records) == 1


def slowly(seconds: float) -> None:
    """A process that needs longer for each pack."""
    quick = TorchEngine.forward_backward
    fsdp = pytest.importorskip("tinyllava_fast.train.engine.fsdp_engine").FSDPEngine
    for engine, compute in ((TorchEngine, quick), (fsdp, fsdp.forward_backward)):

        def late(self, *args, compute=compute):
            time.sleep(seconds)
            return compute(self, *args)

        engine.forward_backward = late


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_slow_process_of_a_run_is_found(tiny_run, tmp_path: Path, engine: str) -> None:
    path = tiny_run()
    arguments = [str(path), f"engine.type={engine}"]
    with Ranks(fork_server(), tmp_path / "said", arguments, faults={1: partial(slowly, 0.2)}) as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0)
        assert ranks.said(0).count("rank 1 on ") >= 1 and "is slow: " in ranks.said(0)
    run = path.parent / "run"
    entries = [json.loads(line)["ranks"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(entry["slowest"] == 1 and entry["idle_share"] > 0.25 for entry in entries[1:])
    assert "of their time they wait for the slowest; the slowest is rank 1, with 1." in str(read_status(run))
