"""`tlf-bench gpu`: in a few minutes on one GPU, what of this toolkit holds there and how fast it is.

Each step is a process of its own with a time limit (bench/gpu_job.py); steps that measure no time run side by side.
The folder holds a report, as JSON and as a page, that is written anew every few seconds: a machine that is taken away
leaves what was found until then.

    gpu.json      everything
    gpu.md        the same as tables
    launch.json   the Triton kernels' launch table as tuned
    profile.json  the operators of a training step by their time
    log.txt       what the steps' processes said
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

from tinyllava_fast.bench import gpu_page, report
from tinyllava_fast.bench.gpu_job import PATIENCE, read_lines, rows_of, rows_path, work_folder
from tinyllava_fast.bench.gpu_settings import PLAN, GpuSettings
from tinyllava_fast.bench.report import Report
from tinyllava_fast.errors import UserError
from tinyllava_fast.files import write_file
from tinyllava_fast.log import log

FORMAT = "tlf-bench gpu 1"
EVERY_S = 3.0
LEAST_S = 10.0
"""A step that has less time than this is left out: imports alone take it."""
TAIL = 3000
"""Characters of a process's last words that the report keeps."""


@dataclass
class Step:
    """A step as it stands. status: waiting, running, done, failed, timeout, or left out; error: why."""

    name: str
    limit: float
    timed: bool
    status: str = "waiting"
    seconds: float = 0.0
    error: str = ""
    rows: dict[str, Report] = field(default_factory=dict)
    crashed: list[str] = field(default_factory=list)
    """Items whose process ended before they did."""

    @property
    def problems(self) -> int:
        """Rows that are wrong or missing."""
        return sum(row.get("ok") is False for row in self.rows.values()) + len(self.crashed)


class Run:
    """The steps of a run, and the processes of those that are under way."""

    def __init__(self, settings: GpuSettings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.began, self._stopped = time.monotonic(), False
        chosen = settings.steps or tuple(PLAN)
        self.steps = [Step(name, limit, timed) for name, (limit, timed, _) in PLAN.items() if name in chosen]
        self._processes: set[subprocess.Popen[bytes]] = set()

    @property
    def left(self) -> float:
        """Seconds of the whole run that are left."""
        minutes = self.settings.minutes * (PATIENCE if self.settings.dry_run else 1)
        return 0.0 if self._stopped else 60 * minutes - (time.monotonic() - self.began)

    def go(self) -> None:
        """Run all steps, writing the report as they go."""
        try:
            for timed, group in groupby(self.steps, key=lambda step: step.timed):
                steps = list(group)
                with ThreadPoolExecutor(1 if timed else len(steps)) as pool:
                    pending = {pool.submit(self._step, step) for step in steps}
                    try:
                        while pending:
                            done, pending = wait(pending, timeout=EVERY_S)
                            self.write()
                            for future in done:
                                future.result()
                    finally:  # also if this process is told to end: the threads wait for those processes
                        if pending:
                            self._stop()
        finally:
            self.write()

    def _stop(self) -> None:
        """End what runs; nothing more begins."""
        self._stopped = True
        for process in list(self._processes):
            _kill(process)

    def _step(self, step: Step) -> None:
        limit = min(step.limit * (PATIENCE if self.settings.dry_run else 1), self.left)
        if limit < LEAST_S:
            step.status, step.error = "left out", "no time was left"
            return
        step.status, began = "running", time.monotonic()
        while True:
            code = self._process(step, limit - (time.monotonic() - began))
            step.seconds = time.monotonic() - began
            stopped = self._unfinished(step)
            new = [name for name in stopped if name not in step.crashed]
            step.crashed += new
            if code == 0 or code is None or not new or min(limit - step.seconds, self.left) < LEAST_S:
                break  # nothing was learnt about what to leave out, or no time is left
        step.status = "timeout" if code is None else "failed" if code else "done"
        if code or code is None:
            step.error = f"exit code {code}" if code is not None else f"not over after {limit:.0f} s"
        log.info("%s: %s in %.0f s, %d rows, %d problems", *_line(step))

    def _process(self, step: Step, seconds: float) -> int | None:
        """Run the step's process once; returns its exit code, None if it took longer than the seconds."""
        path = log_path(self.folder, step.name)
        with path.open("ab") as out:
            process = subprocess.Popen(
                self.command(step.name),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # so that what it starts can be ended with it
                env={**os.environ, **_ENVIRONMENT, **(_INTERPRETED if self.settings.dry_run else {})},
            )
        self._processes.add(process)
        try:
            return process.wait(timeout=max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            _kill(process)
            self._processes.discard(process)
            process.wait()

    def command(self, step: str) -> list[str]:
        """Return the command of a step's process."""
        words = [sys.executable, "-m", "tinyllava_fast.bench.gpu_job", step, str(self.folder)]
        return [*words, *(["--tiny"] if self.settings.dry_run else [])]

    def _unfinished(self, step: Step) -> list[str]:
        lines = read_lines(rows_path(self.folder, step.name))
        ended = {line["ended"] for line in lines if "ended" in line}
        return [line["begun"] for line in lines if "begun" in line and line["begun"] not in ended]

    def report(self) -> Report:
        """Return the report so far: {format, settings, seconds, steps}."""
        steps = []
        for step in self.steps:
            step.rows = rows_of(read_lines(rows_path(self.folder, step.name)))
            steps.append({**asdict(step), "problems": step.problems, "tail": _tail(log_path(self.folder, step.name))})
        settings = {k: v for k, v in asdict(self.settings).items() if k != "out"}
        return {
            "format": FORMAT,
            "settings": settings,
            "seconds": time.monotonic() - self.began,
            "versions": gpu_page.versions(),
            "steps": steps,
        }

    def write(self) -> None:
        """Write the report's files."""
        found = self.report()
        logs = [f"==== {s.name}\n{_tail(log_path(self.folder, s.name), 10**6)}\n" for s in self.steps]
        texts = {"gpu.json": json.dumps(found, indent=1), "gpu.md": gpu_page.page(found), "log.txt": "".join(logs)}
        for name, text in texts.items():
            write_file(self.folder / name, text.encode(), durable=False)


_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
_INTERPRETED = {"TRITON_INTERPRET": "1"}  # read once, when a kernel is first imported


def benchmark(settings: GpuSettings) -> Report:
    """Run the plan and return its report. UserError without a GPU, unless it is a dry run, and for a used folder."""
    if not settings.dry_run:
        import torch

        if not torch.cuda.is_available():
            raise UserError("tlf-bench gpu: torch sees no GPU here; --dry-run walks the same plan on a CPU, tiny")
    folder = settings.out or Path("runs") / time.strftime("gpu-%Y%m%d-%H%M%S")
    if (folder / "gpu.json").exists():
        raise UserError(f"--out {folder}: it holds the results of another run; name a new folder")
    try:
        work_folder(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot make that folder ({error.strerror}); name another") from None
    run = Run(settings, folder)
    log.info("%d steps, at most %g minutes; results in %s", len(run.steps), settings.minutes, folder)
    run.go()
    return run.report()


def log_path(folder: Path, step: str) -> Path:
    """Return the file of what a step's processes say."""
    return work_folder(folder) / f"{step}.log"


def _tail(path: Path, size: int = TAIL) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode("utf-8", errors="replace")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _line(step: Step) -> tuple[str, str, float, int, int]:
    return step.name, step.status, step.seconds, len(step.rows), step.problems


def show(result: Report) -> None:
    """Print one line a step."""
    columns = {"step": "{name}", "status": "{status}", "seconds": "{seconds:.0f}", "problems": "{problems}"}
    report.table(f"GPU run, {result['seconds']:.0f} s", columns, result["steps"])
