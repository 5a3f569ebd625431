"""``make soak``: runs of two processes, disturbed at random instants until they end, must end as an undisturbed one.

    python -m tests.train.soak [--faults 200] [--seed 0] [--commands 6] [--engines ddp,fsdp] [--steps 48]

Processes are killed (one, both), stopped, told to stop (one, both, with too little time), and their disk fills up; at
the start, between steps and inside saves, under ddp and fsdp in turn. After each fault it is checked that all processes
end within seconds and say why, that no loss differs from the undisturbed run's, bit for bit, that no rank took another
sample at any step, and that the steps that were lost are those since the last checkpoint. The processes are forked from
one that has imported everything, so that a restart costs a second; the last faults, --commands of them, hit
``tlf-train --nproc 2 --max-restarts`` itself. The full disk needs a file system of its own (Linux's unshare and
tmpfs); where there is none, that fault is left out, which the output says.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path

import psutil

from tests.train.conftest import prepare
from tests.train.notes import Notes, take_note
from tests.train.processes import PRELOADED, Ranks, fork_server
from tinyllava_fast.train.checkpoint import CheckpointStore

EVERY, STEPS, SILENCE = 4, 48, 10
"""Steps between checkpoints, steps of a run, and engine.silence_timeout."""
PATIENCE = 60.0
"""Seconds for all processes to end after a fault, on a busy machine."""
INSIDE = "TLF_SOAK_DISK"
SIZE = 64  # MB of the disk that fills up
ENGINES = ("ddp", "fsdp")


def losses(run: Path) -> dict[int, float]:
    """Step -> loss of the whole lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return {entry["step"]: entry["loss"] for entry in entries}


@dataclass
class Disk:
    """The file system that the runs lie on, which can be filled. own: it holds nothing else."""

    folder: Path
    own: bool

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"

    def fill(self) -> None:
        """Leave no byte free."""
        with self._ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                pass

    def free(self) -> None:
        """Undo that."""
        self._ballast.unlink(missing_ok=True)


Pids = Sequence[int]
Codes = Sequence[int | None]


def send(number: int, *ranks: int) -> Callable[[Pids, Disk], None]:
    """A fault that sends a signal to some ranks."""
    return lambda pids, _: [os.kill(pids[rank], number) for rank in ranks] and None


def preempt(pids: Pids, _: Disk) -> None:
    """Tell all to stop and kill them before they have saved."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(0.02)


@dataclass(frozen=True)
class Fault:
    """A fault. codes: exit codes of both ranks that may follow once steps are made. said: by those that survive."""

    name: str
    hit: Callable[[Pids, Disk], None]
    codes: tuple[set[int], set[int]]
    said: str = ""
    stepping: bool = False
    """Only between the first step and the end: before, nothing watches yet."""


KILLED, STOPPED, LOST = {-signal.SIGKILL}, {143}, {1}
FAULTS = [
    Fault("rank 0 killed", send(signal.SIGKILL, 0), (KILLED, LOST), "rank 0 (process {0}) was killed"),
    Fault("rank 1 killed", send(signal.SIGKILL, 1), (LOST, KILLED), "rank 1 (process {1}) was killed"),
    Fault("both killed", send(signal.SIGKILL, 0, 1), (KILLED, KILLED)),
    Fault("rank 0 stopped", send(signal.SIGSTOP, 0), (KILLED, LOST), "rank 0 (process {0}) is stopped", True),
    Fault("rank 1 stopped", send(signal.SIGSTOP, 1), (LOST, KILLED), "rank 1 (process {1}) is stopped", True),
    Fault("SIGTERM to rank 1", send(signal.SIGTERM, 1), (STOPPED, STOPPED), "goes on from"),
    Fault("SIGTERM to both", send(signal.SIGTERM, 0, 1), (STOPPED, STOPPED), "goes on from"),
    Fault("SIGTERM, then SIGKILL", preempt, (KILLED | STOPPED, KILLED | STOPPED)),
    Fault("disk full", lambda _, disk: disk.fill(), (LOST, LOST), "No space left", True),
]


@dataclass
class Soak:
    """Faults so far, and what each has cost."""

    server: ForkServerContext
    disk: Disk
    rng: random.Random
    path: Path
    hits: Counter[str] = field(default_factory=Counter)
    in_save: int = 0
    rows: list[tuple[str, float, float, int]] = field(default_factory=list)
    """Fault, seconds until all had ended, seconds of the restart until its first step, steps lost."""
    step_s: float = 0.0

    def arguments(self, engine: str, run: Path) -> list[str]:
        """The command line of a run."""
        return [str(self.path), f"engine.type={engine}", f"output_dir={run}"]

    def ranks(self, engine: str, run: Path, notes: Notes) -> Ranks:
        """Two processes of it."""
        fault = partial(take_note, notes.folder)
        said = notes.folder / f"said-{time.monotonic_ns()}"
        return Ranks(self.server, said, self.arguments(engine, run), faults={0: fault, 1: fault})

    def undisturbed(self, engine: str) -> tuple[Path, Notes]:
        """Run once without a fault."""
        run, notes = self.path.parent / f"whole-{engine}", Notes(self.path.parent / f"notes-{engine}")
        with self.ranks(engine, run, notes) as ranks:
            assert ranks.wait(600) == [0, 0], ranks.said(0)
        moments = [moment for moment, _, _ in notes.of(0)]
        self.step_s = statistics.median(b - a for a, b in itertools.pairwise(moments))
        return run, notes

    def round(self, engine: str, whole: tuple[Path, Notes], number: int, most: int) -> None:
        """Disturb one run until it has ended, ``most`` times at most, and compare it with the whole one."""
        run, notes = self.disk.folder / f"run-{number}", Notes(self.path.parent / f"notes-{number}")
        expected = losses(whole[0])
        codes: Codes = [None, None]
        while codes != [0, 0]:
            with self.ranks(engine, run, notes) as ranks:
                hit = self._disturb(ranks, run, notes, expected) if most else False
                most -= hit
                if not hit:
                    codes = ranks.wait(600)
                    assert codes == [0, 0], ranks.said(0) + ranks.said(1)
        assert losses(run) == expected
        for rank in (0, 1):
            assert notes.samples(rank) == whole[1].samples(rank), f"rank {rank} took other samples"
        models = [(folder / "final" / "model.safetensors").read_bytes() for folder in (run, whole[0])]
        assert models[0] == models[1]
        counts = [json.loads((folder / "summary.json").read_text()) for folder in (run, whole[0])]
        assert all(counts[0][name] == counts[1][name] for name in ("steps", "samples", "loss"))
        assert not list(run.glob("checkpoints/.tmp-*")) and not list(run.glob(".tmp-*"))
        shutil.rmtree(run)

    def _disturb(self, ranks: Ranks, run: Path, notes: Notes, expected: dict[int, float]) -> bool:
        """Hit the processes once. False: they ended before."""
        began, before = time.time(), len(notes.of(0))
        fault = self.rng.choice([f for f in FAULTS if self.disk.own or f.name != "disk full"])
        if not self._wait(ranks, run, notes, before, fault):
            return False
        stepping, reached = len(notes.of(0)) > before, max(losses(run), default=0)
        pids = [int(process.pid or 0) for process in ranks.processes]
        inside = any((run / "checkpoints").glob(".tmp-*"))
        moment = time.time()
        fault.hit(pids, self.disk)
        codes = end_of(ranks)
        ended = time.time()
        self.disk.free()
        self._check(fault, ranks, codes, pids, stepping, run)
        found = losses(run)
        assert all(expected[step] == loss for step, loss in found.items()), f"{fault.name}: losses differ"
        saved = max((int(n[-8:]) for n in CheckpointStore(run / "checkpoints", 9).names()), default=0)
        lost = max(reached - saved, 0)
        assert lost <= 2 * EVERY, f"{fault.name}: {lost} steps lost"  # a save under way may be of one interval
        first = next((m for m, _, _ in notes.of(0)[before:]), moment)
        self.hits[fault.name] += 1
        self.in_save += inside
        self.rows.append((fault.name, ended - moment, first - began if stepping else 0.0, lost))
        return True

    def _wait(self, ranks: Ranks, run: Path, notes: Notes, before: int, fault: Fault) -> bool:
        """Wait for a random instant: at the start, after some steps, or inside a save. False: one has ended."""
        kind = self.rng.choice(["steps", "steps", "save", "save"] + ["start"] * (not fault.stepping))
        steps = self.rng.randint(1, 5)
        pause = self.rng.uniform(0, {"start": 0.8, "save": 0.01, "steps": 0.05}[kind])
        while kind != "start" and len(notes.of(0)) < before + steps:
            if not alive(ranks):
                return False
            time.sleep(0.002)
        while kind == "save" and not any((run / "checkpoints").glob(".tmp-*")):
            if not alive(ranks):
                return False
            time.sleep(0.0005)
        time.sleep(pause)
        return alive(ranks)

    def _check(self, fault: Fault, ranks: Ranks, codes: Codes, pids: Pids, stepping: bool, run: Path) -> None:
        """Check that all ended as they should, with the reason."""
        texts = [ranks.said(rank) for rank in (0, 1)]
        context = f"{fault.name}: exit codes {codes}\n" + "\n".join(texts)
        assert None not in codes, context
        assert 2 not in codes and not any("Traceback" in text for text in texts), context
        over = 0 in codes and (run / "summary.json").exists()
        if stepping and not over:
            assert all(code in allowed for code, allowed in zip(codes, fault.codes, strict=True)), context
            said = fault.said.format(*pids)
            assert said in "".join(texts), context

    def table(self) -> str:
        """What was hit, and what it cost."""
        lines = [
            "| fault | hits | seconds until all had ended, median and most | steps lost, most |",
            "|---|---|---|---|",
        ]
        for name in sorted(self.hits):
            rows = [row for row in self.rows if row[0] == name]
            ends = [row[1] for row in rows]
            lines.append(
                f"| {name} | {len(rows)} | {statistics.median(ends):.2f}, {max(ends):.2f} | {max(r[3] for r in rows)} |"
            )
        starts = [row[2] for row in self.rows if row[2]]
        if starts:
            most = max(row[1] + row[2] + row[3] * self.step_s for row in self.rows)
            start = f"{statistics.median(starts):.2f} s, at most {max(starts):.2f}"
            lines += [
                "",
                f"{len(self.rows)} faults, {self.in_save} inside a save. A restart took {start}, to its first step.",
                f"A step took {self.step_s:.3f} s, and there was a checkpoint every {EVERY} steps.",
                f"The most time that a fault cost (its end, the restart, the steps lost): {most:.1f} s.",
            ]
        return "\n".join(lines)


def alive(ranks: Ranks) -> bool:
    """Whether all processes run."""
    return all(process.is_alive() for process in ranks.processes)


def end_of(ranks: Ranks) -> Codes:
    """Do what torchrun does: once one process has ended, tell the others, and kill at last. Return the exit codes."""
    until = time.monotonic() + PATIENCE
    while alive(ranks) and time.monotonic() < until:
        time.sleep(0.01)
    for process in ranks.processes:
        if process.is_alive() and any(other.exitcode for other in ranks.processes):
            process.terminate()
    if any(process.exitcode == 0 for process in ranks.processes):  # all work is done; nobody waits for a stopped one
        until = min(until, time.monotonic() + 10)
    for process in ranks.processes:
        process.join(max(until - time.monotonic(), 0))
    codes: Codes = [process.exitcode for process in ranks.processes]
    if 0 in codes:
        codes = [-signal.SIGKILL if code is None else code for code in codes]
    return codes


def disturb_command(soak: Soak, engine: str, whole: Path, count: int) -> list[str]:
    """``tlf-train --nproc 2 --max-restarts`` under so many faults; return what was hit."""
    run, said = soak.disk.folder / "run-command", soak.path.parent / "said-command.txt"
    command = [sys.executable, "-m", "tinyllava_fast.train.cli", *soak.arguments(engine, run)]
    command += ["--nproc", "2", "--max-restarts", str(count)]
    names = ["rank 0 killed", "rank 1 stopped", *["disk full"] * soak.disk.own, "rank 1 killed"]
    hits: list[str] = []
    with said.open("w") as output, subprocess.Popen(command, stderr=output) as launcher:
        try:
            while len(hits) < count and launcher.poll() is None:
                fault = next(f for f in FAULTS if f.name == names[len(hits) % len(names)])
                reached = max(losses(run), default=0) + soak.rng.randint(1, EVERY)
                pids = _pids_at(launcher, run, reached)
                if not pids:
                    break
                fault.hit(pids, soak.disk)
                hits.append(fault.name)
                psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=PATIENCE)
                soak.disk.free()
                assert not any(psutil.pid_exists(pid) for pid in pids), f"{fault.name}: {said.read_text()}"
            code = launcher.wait(300)
        finally:
            launcher.kill()
    assert code == 0, said.read_text()
    assert losses(run) == losses(whole), "losses differ"
    assert "Traceback" not in said.read_text(), said.read_text()
    return hits


def _pids_at(launcher: subprocess.Popen[bytes], run: Path, step: int) -> list[int]:
    """Return both ranks' processes once the run has made a step; nothing if it ends before."""
    while launcher.poll() is None:
        if max(losses(run), default=0) >= step:
            ranks = {c.environ().get("RANK"): c.pid for c in psutil.Process(launcher.pid).children()}
            if {"0", "1"} <= ranks.keys():
                return [ranks["0"], ranks["1"]]
        time.sleep(0.01)
    return []


def soak(
    folder: Path,
    disk: Disk,
    *,
    faults: int,
    seed: int,
    commands: int,
    say: Callable[[str], object],
    engines: Sequence[str] = ENGINES,
    steps: int = STEPS,
) -> Soak:
    """Disturb runs of so many steps, of these engines in turn, until so many faults have hit."""
    shape = {"stages__pretrain__max_steps": 4, "stages__finetune__max_steps": steps - 4, "loggers": []}
    for stage in ("pretrain", "finetune"):
        shape[f"stages__{stage}__batch__packs_per_step"] = 4
    shape["checkpoint"] = {"every_steps": EVERY, "keep": 2}
    shape["engine__silence_timeout"] = SILENCE
    server = fork_server()
    server.set_forkserver_preload([*PRELOADED, "tests.train.conftest"])
    found = Soak(server, disk, random.Random(seed), prepare(folder, **shape))
    wholes = {engine: found.undisturbed(engine) for engine in engines}
    number = 0
    while len(found.rows) < faults:
        engine, before = engines[number % len(engines)], len(found.rows)
        found.round(engine, wholes[engine], number, faults - before)
        number += 1
        say(f"run {number} ({engine}): {len(found.rows) - before} faults, {len(found.rows)} in all; equal")
    say(found.table())
    if commands:
        hits = disturb_command(found, engines[0], wholes[engines[0]][0], commands)
        say(f"tlf-train --nproc 2 --max-restarts: {', '.join(hits)}: equal")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", type=int, default=6)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--steps", type=int, default=STEPS, help="of a run")
    parser.add_argument("--folder", type=Path, help="where the output of all processes stays (default: removed)")
    args = parser.parse_args(argv)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if INSIDE not in os.environ:
        inside = ["unshare", "--map-root-user", "--mount", sys.executable, "-m", "tests.train.soak", *arguments]
        if shutil.which("unshare") and subprocess.run([*inside[:3], "true"], capture_output=True).returncode == 0:
            os.environ[INSIDE] = "1"
            os.execvp(inside[0], inside)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    disk = Disk(folder / "disk", own=False)
    disk.folder.mkdir(parents=True)
    if os.environ.get(INSIDE):
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}m", "none", str(disk.folder)])
        disk.own = mounted.returncode == 0

    def say(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    if not disk.own:
        say("no file system of its own can be mounted here: the disk is never full")
    try:
        chosen = {"faults": args.faults, "seed": args.seed, "commands": args.commands, "steps": args.steps}
        soak(folder / "work", disk, **chosen, engines=args.engines.split(","), say=say)
    finally:
        if disk.own:
            subprocess.run(["umount", str(disk.folder)], check=False)
    if not args.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
