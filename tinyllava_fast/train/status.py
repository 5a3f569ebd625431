"""`tlf-train status RUN`: where a run stands, in plain words, from the files of its folder and the lock on it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, cast

from tinyllava_fast.errors import UserError
from tinyllava_fast.train.history import History
from tinyllava_fast.train.progress import format_seconds
from tinyllava_fast.train.pulse import FILE, LOCK, Pulse, this_place
from tinyllava_fast.train.standing import numbers_of

PATIENCE_S = 60.0  # a step that takes longer than this, and than
PATIENCE_STEPS = 20  # so many average ones, stalls
LONG_S = 900.0  # what is said to take long stalls only after that

Verdict = Literal["preparing", "running", "stalled", "finished", "stopped", "diverged", "failed", "dead", "unknown"]


@dataclass
class Status:
    """Where a run stands. said: in plain words. Steps are of the stage; eta_s: to the end of the run, about."""

    run: str
    state: Verdict
    said: str
    why: str = ""
    stage: str = ""
    stage_step: int = 0
    stage_steps: int = 0
    step: int = 0
    eta_s: float | None = None
    updated_s_ago: float | None = None
    pid: int | None = None
    loss: float | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss) of the last lines of metrics.jsonl."""
    validation_losses: list[tuple[int, float]] = field(default_factory=list)
    ranks: dict[str, float] = field(default_factory=dict)
    """The last line's, of a run of several processes."""
    best: dict[str, object] = field(default_factory=dict)
    checkpoint: str = ""
    """The newest one, of a run that needs somebody."""

    @property
    def well(self) -> bool:
        """Return whether nobody has to do anything: it prepares, runs or has finished."""
        return self.state in ("preparing", "running", "finished")

    def as_json(self) -> str:
        """Return all of it as JSON."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        """Return it in plain words."""
        lines = [f"{self.run}: {self.said}"]
        if self.stage:
            place = f"step {self.stage_step:,} of {self.stage_steps:,}"
            lines.append(f"  stage {self.stage}, {place} (run: step {self.step:,})")
        if self.eta_s:
            lines.append(f"  about {format_seconds(self.eta_s)} to the end of the run")
        for name, values in (("loss", self.losses), ("validation loss", self.validation_losses)):
            if values:
                lines.append(f"  {name}: " + ", ".join(f"{value:.4f} (step {step:,})" for step, value in values))
        if self.ranks:
            lines.append(
                "  processes: {idle_share:.1%} of their time they wait for the slowest; the slowest is rank "
                "{slowest:.0f}, with {imbalance:.2f} times the mean".format(**self.ranks)
            )
        if self.best:
            lines.append(f"  best: step {self.best['step']:,}, {self.best['said']}")
        if self.checkpoint:
            lines.append(f"  newest checkpoint: {self.checkpoint}; the same tlf-train command goes on from it")
        if self.why:
            lines.append("  why: " + self.why.replace("\n", "\n       "))
        return "\n".join(lines)


def read_status(run: str | Path) -> Status:
    """Return where the run of a folder stands. UserError if no run ever wrote there."""
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; give the output_dir of a run, or its configuration")
    holder, pulse = lock_holder(folder / LOCK), _read_pulse(folder / FILE)
    if holder is None and pulse is None and not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: no run has written here: there is no {FILE} and no metrics.jsonl")
    now = time.time()
    state, said = _judge(holder, pulse, folder, now)
    status = Status(run=str(folder), state=state, said=said, pid=holder)
    if pulse is not None:
        status.stage, status.step = pulse["stage"], pulse["step"]
        status.stage_step, status.stage_steps = pulse["stage_step"], pulse["stage_steps"]
        status.eta_s = pulse["eta_s"] if state in ("running", "stalled") else None
        status.updated_s_ago = max(now - pulse["updated"], 0.0)
        status.why = pulse["why"] if state not in ("running", "stalled", "preparing") else ""
    _add_numbers(status, folder)
    if not status.well:
        from tinyllava_fast.train.checkpoint import CheckpointStore  # with torch, which takes its seconds

        newest = CheckpointStore(folder / "checkpoints", 1).latest()
        status.checkpoint = str(newest) if newest else ""
    return status


def lock_holder(path: Path) -> int | None:
    """Return the process that holds the lock of a run folder, without taking it; None: nobody does.

    -1: a process of another machine, or one that the system does not name. Never to be asked by the process that holds
    it: its lock would end when the file is closed here.
    """
    layout = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, process
    asked = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        with path.open("rb") as file:  # of another user, too
            kind, _, _, _, pid = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be asked who trains there: {error.strerror}") from None
    if kind == fcntl.F_UNLCK:
        return None
    return pid if pid > 0 else -1


def _judge(holder: int | None, pulse: Pulse | None, folder: Path, now: float) -> tuple[Verdict, str]:
    """Return the state of a run, and what to say of it."""
    if holder is not None:
        if pulse is None or not _is_of_holder(pulse, holder, folder):
            process = f"process {holder}" if holder > 0 else "a process that cannot be seen from here"
            return "preparing", f"alive ({process}), getting ready for its first step"
        return _judge_alive(_process(pulse), pulse, now)
    if pulse is None:
        finished = (folder / "summary.json").is_file()
        return ("finished", "finished") if finished else ("unknown", "no process trains here, and it has no summary")
    ago = f"{format_seconds(now - pulse['updated'])} ago"
    if pulse["state"] == "finished":
        return "finished", f"finished {ago}"
    if pulse["state"] == "stopped":
        return "stopped", f"stopped by a signal {ago}"
    if pulse["state"] == "diverged":
        return "diverged", f"the training diverged {ago}"
    if pulse["state"] == "failed":
        return "failed", f"ended by an error {ago}"
    if not _is_here(pulse):  # not every file system shows the locks of other machines and containers
        return _judge_unseen(pulse, now)
    during = f" while {pulse['doing']}" if pulse["doing"] else ""
    return "dead", (
        f"dead: its process {pulse['pid']} on {pulse['host']} is gone without a word, last seen {ago}{during}; it was "
        "killed (kill -9, or by the system for want of memory), or the machine went down"
    )


def _is_here(pulse: Pulse) -> bool:
    """Return whether the process of a pulse would be seen from here, on this machine and in this container."""
    here = this_place()
    if not (pulse.get("boot") and here["boot"]):
        return pulse["host"] == socket.gethostname()
    return (pulse["boot"], pulse["pids"]) == (here["boot"], here["pids"])


def _is_of_holder(pulse: Pulse, holder: int, folder: Path) -> bool:
    """Return whether the process that holds the lock is the one that wrote the pulse, not one that follows it."""
    try:
        told = json.loads((folder / LOCK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told = {}
    if isinstance(told, dict) and "pid" in told:
        return all(told.get(key) == pulse.get(key) for key in ("pid", "boot", "pids"))
    return holder < 0 or not _is_here(pulse) or pulse["pid"] == holder


def _process(pulse: Pulse) -> str:
    """Return the name of the process of a pulse, as it is known here."""
    if _is_here(pulse):
        return f"process {pulse['pid']}"
    return f"process {pulse['pid']} on {pulse['host']}, which cannot be seen from here"


def _judge_unseen(pulse: Pulse, now: float) -> tuple[Verdict, str]:
    """Return the state of a run of another machine or container, whose lock does not show here: by its heartbeat."""
    state, said = _judge_alive(f"{_process(pulse)}, by its heartbeat", pulse, now)
    silent = now - (pulse["doing_since"] if pulse["doing"] else pulse["updated"])
    if state == "running" or silent < LONG_S:
        return state, said
    return "dead", (
        f"dead, or out of reach: {_process(pulse)}, was last heard {format_seconds(silent)} ago; ask on "
        f"{pulse['host']}, or in its container, to be sure"
    )


def _judge_alive(process: str, pulse: Pulse, now: float) -> tuple[Verdict, str]:
    silent = now - pulse["updated"]
    if pulse["doing"]:
        since = now - pulse["doing_since"]
        state: Verdict = "running" if since < LONG_S else "stalled"
        word = "alive" if state == "running" else "stalled"
        return state, f"{word} ({process}), {pulse['doing']} for {format_seconds(since)}"
    if silent > max(PATIENCE_S, PATIENCE_STEPS * pulse["step_s"]):
        return "stalled", (
            f"stalled ({process}): no step for {format_seconds(silent)}, where one takes {pulse['step_s']:.2g} s; it "
            "may wait for data, a disk, or another process"
        )
    return "running", f"alive ({process}), {pulse['step_s']:.2g} s a step"


def _add_numbers(status: Status, folder: Path, count: int = 3) -> None:
    history = History.read(folder / "metrics.jsonl")
    last = history.last
    if last is None:
        return
    status.loss = last["loss"]
    status.ranks = {name: float(cast(float, value)) for name, value in last.get("ranks", {}).items()}
    stage = last["stage"]
    status.stage, status.step = status.stage or stage, max(status.step, last["step"])
    for kind, held in (("loss", status.losses), ("validation loss", status.validation_losses)):
        if (series := history.of(kind).get(stage)) is not None:
            held += list(zip(series.steps[-count:], series.values[-count:], strict=True))
    if stage in history.best:
        step, found = history.best[stage]
        status.best = {"step": step, "said": numbers_of(found), **found}


def _read_pulse(path: Path) -> Pulse | None:
    """Return status.json; None without one, or for one that is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or not Pulse.__required_keys__ <= found.keys():
        return None
    return cast(Pulse, found)
