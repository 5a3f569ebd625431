"""Real processes of one run over gloo: forked from a server that has imported everything, so that each costs little."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed import TCPStore

PRELOADED = ["tinyllava_fast.train.loop", "tinyllava_fast.train.engine.fsdp_engine", "torch.utils.tensorboard"]
Fault = Callable[[], object]
"""Called in one process before it trains. A function of a module, which the process imports."""


def fork_server() -> ForkServerContext:
    """Return the context that ``Ranks`` takes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _train(environment: dict[str, str], output: Path, argv: list[str], fault: Fault | None) -> None:
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    from tinyllava_fast.train import cli

    gc.freeze()  # a collection over all that was imported stops a process for seconds on a busy machine
    if fault:
        fault()
    sys.argv[1:] = argv
    cli.command()


@dataclass
class Ranks:
    """The processes of ``tlf-train`` with some arguments. faults: by rank.

    launcher: as under torchrun the store outlives every process; False: as under a scheduler, rank 0 keeps it.
    """

    server: ForkServerContext
    folder: Path
    argv: Sequence[str]
    count: int = 2
    faults: dict[int, Fault] = field(default_factory=dict)
    launcher: bool = True
    processes: list[BaseProcess] = field(default_factory=list)

    def __enter__(self) -> Ranks:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if self.launcher else None
        shared = {
            **{
                "WORLD_SIZE": str(self.count),
                "LOCAL_WORLD_SIZE": str(self.count),
                "TORCHELASTIC_USE_AGENT_STORE": str(self.launcher),
            },
            **{"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"},
            "MASTER_PORT": str(self._store.port if self._store else _free_port()),
        }
        for rank in range(self.count):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = (environment, self.folder / f"{rank}.txt", list(self.argv), self.faults.get(rank))
            self.processes.append(self.server.Process(target=_train, args=arguments))
            self.processes[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Return the exit codes of all; None of one that has not ended in time."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(until - time.monotonic(), 0))
        return [process.exitcode for process in self.processes]

    def said(self, rank: int) -> str:
        """Return what a process wrote to stderr; "" of one that was killed before it could."""
        path = self.folder / f"{rank}.txt"
        return path.read_text() if path.exists() else ""

    def lines(self) -> list[str]:
        """Return the errors and tracebacks of all processes."""
        return [line for rank in range(self.count) for line in self.said(rank).splitlines() if _is_error(line)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_error(line: str) -> bool:
    return " ERROR " in line or line.startswith("Traceback")
