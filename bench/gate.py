"""A worker process steps only when the parent says so: two competitors share the machine without ever overlapping.

One JSON object a line. Parent to worker {"steps": k}; worker to parent {"ready": {...}} once, then after each order
{"seconds": [k floats], "losses": [k floats], "peak_rss_bytes": int}. A waiting worker blocks in read: it costs no CPU.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from tinyllava_fast.errors import UserError
from tinyllava_fast.hardware import peak_rss_bytes, reset_peak_rss


class Gate:
    """The worker's end. ``begin`` blocks until a step is ordered; ``end`` reports when the order is carried out."""

    def __init__(self, orders: IO[str], answers: IO[str], sync: Callable[[], None] | None = None) -> None:
        self._orders, self._answers, self._sync = orders, answers, sync
        self._left = 0
        self._started = 0.0
        self._seconds: list[float] = []
        self._losses: list[float] = []

    def ready(self, facts: dict[str, Any]) -> None:
        """Tell the parent that models and samples are in place; the peak of memory counts from here."""
        reset_peak_rss()
        self._say({"ready": facts})

    def begin(self) -> None:
        """Wait for an order if none is open, then start the clock. EOFError when the parent has gone."""
        if self._left == 0:
            line = self._orders.readline()
            if not line:
                raise EOFError("the parent closed the pipe")
            self._left = int(json.loads(line)["steps"])
            self._seconds, self._losses = [], []
        if self._sync is not None:
            self._sync()
        self._started = time.perf_counter()

    def end(self, loss: float) -> None:
        """Stop the clock of this step (``loss`` is on the host already) and report after the last one of the order."""
        if self._sync is not None:
            self._sync()
        self._seconds.append(time.perf_counter() - self._started)
        self._losses.append(loss)
        self._left -= 1
        if self._left == 0:
            self._say({"seconds": self._seconds, "losses": self._losses, "peak_rss_bytes": peak_rss_bytes()})

    def _say(self, message: dict[str, Any]) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()


class Worker:
    """The parent's end: a subprocess of ``python -m <module>`` that talks through its standard streams."""

    def __init__(self, name: str, module: str, arguments: Sequence[str], log: Path) -> None:
        self.name, self._log_path = name, log
        self._log = log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def ready(self) -> dict[str, Any]:
        """Wait until the worker has built everything; returns the facts it tells."""
        return self._listen()["ready"]

    def steps(self, count: int) -> dict[str, Any]:
        """Order ``count`` steps and wait for them; returns the worker's answer."""
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101 opened as a pipe above
        try:
            stdin.write(json.dumps({"steps": count}) + "\n")
            stdin.flush()
        except BrokenPipeError:
            self._fail()
        return self._listen()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker and close the pipes."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # an order that a dead worker never read
                    stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _listen(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None  # noqa: S101 opened as a pipe above
        line = stdout.readline()
        if not line:
            self._fail()
        return json.loads(line)

    def _fail(self) -> None:
        code = self._process.wait()
        tail = self._log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
        raise UserError(f"the {self.name} process of the benchmark ended with code {code}:\n  " + "\n  ".join(tail))
