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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn, TypedDict

from tinyllava_fast.errors import UserError
from tinyllava_fast.hardware import peak_rss_bytes, reset_peak_rss


class Facts(TypedDict):
    """The facts that a worker tells when it is ready: means over all packs, and sizes."""

    setup_seconds: float
    flops: dict[str, float]  # useful ones of a step, by part of the model
    budget: int  # tokens of a pack, padding included
    tokens_per_step: float
    supervised_per_step: float
    padded_tokens_per_step: float  # of the peer's batches
    parameters: int
    state_bytes: dict[str, int]  # see sides.state_bytes; empty unless the side is ours


class Answer(TypedDict):
    """The answer of a worker when an order is carried out."""

    seconds: list[float]  # of each step
    losses: list[float]  # of each step
    peak_rss_bytes: int
    peak_device_bytes: int  # of tensors on a GPU; 0 on a CPU


class Gate:
    """The worker's end. ``begin`` blocks until a step is ordered; ``end`` reports when the order is carried out."""

    def __init__(
        self,
        orders: IO[str],
        answers: IO[str],
        sync: Callable[[], None] | None = None,
        peak: Callable[[], int] = lambda: 0,
    ) -> None:
        """sync: waits for the device. peak: its most bytes since the last call."""
        self._orders, self._answers, self._sync, self._peak = orders, answers, sync, peak
        self._left = 0
        self._started = 0.0
        self._seconds: list[float] = []
        self._losses: list[float] = []

    def ready(self, facts: Facts) -> None:
        """Tell the parent that models and samples are in place; the peak of memory counts from here."""
        reset_peak_rss()
        self._peak()
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
            self._say(
                {
                    "seconds": self._seconds,
                    "losses": self._losses,
                    "peak_rss_bytes": peak_rss_bytes(),
                    "peak_device_bytes": self._peak(),
                }
            )

    def _say(self, message: Mapping[str, object]) -> None:
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
        assert self._process.stdin and self._process.stdout  # noqa: S101 pipes, as ordered above
        self._orders, self._answers = self._process.stdin, self._process.stdout

    def ready(self) -> Facts:
        """Wait until the worker has built everything; returns the facts it tells."""
        return json.loads(self._listen())["ready"]

    def steps(self, count: int) -> Answer:
        """Order ``count`` steps and wait for them; returns the worker's answer."""
        try:
            self._orders.write(json.dumps({"steps": count}) + "\n")
            self._orders.flush()
        except BrokenPipeError:
            self._fail()
        return json.loads(self._listen())

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker and close the pipes."""
        for stream in (self._orders, self._answers):
            with contextlib.suppress(BrokenPipeError):  # an order that a dead worker never read
                stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _listen(self) -> str:
        line = self._answers.readline()
        if not line:
            self._fail()
        return line

    def _fail(self) -> NoReturn:
        code = self._process.wait()
        tail = self._log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
        raise UserError(f"the {self.name} process of the benchmark ended with code {code}:\n  " + "\n  ".join(tail))
