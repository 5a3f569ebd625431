"""status.json of a run folder: what the run that writes there is doing, so that others see whether it is alive.

A run that is killed leaves its last word, "running"; that nobody holds the lock of the folder then tells the rest
(train/status.py).
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Literal, TypedDict

from tinyllava_fast.files import write_file
from tinyllava_fast.log import log

FILE = "status.json"
LOCK = ".lock"
"""The file that the process of a run holds a lock on for as long as it lives."""
EVERY_S = 5.0

State = Literal["running", "finished", "stopped", "diverged", "failed"]


class Place(TypedDict, total=False):
    """Where a process runs, for whoever asks about it from elsewhere; what an older version wrote has none of it.

    boot: the machine, since it was started. pids: the space of its process numbers, a container's own or the host's.
    """

    boot: str
    pids: str


def this_place() -> Place:
    """Return the place of this process; empty texts where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return {"boot": boot, "pids": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return {"boot": "", "pids": ""}


class Pulse(Place):
    """The content of status.json. Times are seconds since 1970. doing: what takes long between steps, or ""."""

    state: State
    why: str
    """Of what ended the run before its time, in the words of its error."""
    doing: str
    doing_since: float
    stage: str
    stage_step: int
    stage_steps: int
    step: int
    step_s: float
    """Seconds of a step, so far on average."""
    eta_s: float
    """Seconds to the end of the run, about."""
    started: float
    updated: float
    pid: int
    host: str


class Heart:
    """Writes status.json, at most every few seconds."""

    def __init__(self, run: Path) -> None:
        self._path = run / FILE
        now = time.time()
        self.pulse: Pulse = {
            "state": "running",
            "why": "",
            "doing": "",
            "doing_since": now,
            "stage": "",
            "stage_step": 0,
            "stage_steps": 0,
            "step": 0,
            "step_s": 0.0,
            "eta_s": 0.0,
            "started": now,
            "updated": now,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            **this_place(),
        }
        self._next = 0.0

    def beat(self, *, stage: str, stage_step: int, stage_steps: int, step: int, step_s: float, eta_s: float) -> None:
        """Note where the run stands after a step."""
        pulse = self.pulse
        pulse["stage"], pulse["stage_step"], pulse["stage_steps"] = stage, stage_step, stage_steps
        pulse["step"], pulse["step_s"], pulse["eta_s"] = step, step_s, eta_s
        did, pulse["doing"] = pulse["doing"], ""
        if did or time.monotonic() >= self._next:
            self._write()

    def begin(self, doing: str) -> None:
        """Note that something begins that may take long."""
        self.pulse["doing"], self.pulse["doing_since"] = doing, time.time()
        self._write()

    def end(self, state: State, why: str = "") -> None:
        """Note how the run has ended."""
        self.pulse["state"], self.pulse["why"], self.pulse["doing"] = state, why, ""
        if state == "finished":
            self.pulse["eta_s"] = 0.0
        self._write()

    def _write(self) -> None:
        self.pulse["updated"] = time.time()
        self._next = time.monotonic() + EVERY_S
        try:
            write_file(self._path, (json.dumps(self.pulse, indent=1) + "\n").encode(), durable=False)
        except OSError as error:  # no reason to lose a step
            log.warning("%s: cannot be written: %s", self._path, error.strerror or error)
