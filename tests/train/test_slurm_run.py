"""Two processes that srun has started train one run, and end with 0 once SLURM asks them to."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.train.processes import _train, fork_server

SHAPE = {"engine__type": "ddp", "checkpoint__every_steps": 0, "stages__finetune__max_steps": 5000}


def test_srun_starts_and_sigusr1_ends_with_zero(
    tiny_run: Callable[..., Path], tmp_path: Path, losses: Callable[[Path], list[tuple[int, str, float]]]
) -> None:
    path, folder = tiny_run(**SHAPE), tmp_path / "run"
    shared = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_NODEID": "0", "OMP_NUM_THREADS": "1"}
    shared |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    words, server = [str(path), f"output_dir={folder}"], fork_server()
    processes = []
    for rank in ("0", "1"):
        environment = {**shared, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        said = tmp_path / f"{rank}.txt"
        processes.append(server.Process(target=_train, args=(environment, said, words, None)))
        processes[-1].start()
    try:
        until = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() or len(losses(folder)) < 6:
            assert time.monotonic() < until and all(p.is_alive() for p in processes), said.read_text()
            time.sleep(0.02)
        for process in processes:
            os.kill(process.pid or 0, signal.SIGUSR1)
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0], said.read_text()
    finally:
        for process in processes:
            process.kill()
    done = len(losses(folder))
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
    assert (folder / "checkpoints" / "latest").read_text().strip().endswith(f"{done:08}")
