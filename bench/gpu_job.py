"""One step of `tlf-bench gpu` in a process of its own: ``python -m tinyllava_fast.bench.gpu_job STEP FOLDER``.

What a step finds it writes at once, a JSON object a line, so that nothing is lost when it is killed. Its items run one
after another; one that fails is noted and the next begins. An item that crashes the process, hangs, or leaves the GPU
unusable ends the process, and the runner starts the step again behind that item.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tinyllava_fast.bench.report import Report
from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log, setup_logging
from tinyllava_fast.registry import Registry

PATIENCE = 4
"""Times the limits of steps and items in a dry run: its machine may be slow, and nobody lends it by the minute."""
AGAIN = 75
"""Exit code of a process that asks to be started again: its GPU takes no more work."""


class Job:
    """The orders of a step, and the file of its findings. tiny: a dry run, of shapes that a CPU takes in seconds."""

    def __init__(self, step: str, folder: Path, *, tiny: bool) -> None:
        self.step, self.folder, self.tiny = step, folder, tiny
        self.device = "cpu" if tiny else "cuda"
        self._path = rows_path(folder, step)
        self._begun = {line["begun"] for line in read_lines(self._path) if "begun" in line}

    @property
    def scratch(self) -> Path:
        """A folder for the step's own files."""
        path = work_folder(self.folder) / self.step
        path.mkdir(parents=True, exist_ok=True)
        return path

    def tell(self, name: str, **values: object) -> None:
        """Write a row; one of the same name replaces it. ok=False: what was measured is wrong."""
        self._write({"row": name, **values})

    def found(self, step: str, name: str) -> Report | None:
        """Return a row that a step has written so far, None if there is none."""
        return rows_of(read_lines(rows_path(self.folder, step))).get(name)

    def each(self, names: Iterable[str], seconds: float, run: Callable[[str], None]) -> None:
        """Call ``run`` with every name that has not begun in an earlier process. seconds: that one may take."""
        for name in names:
            if name in self._begun:
                continue
            self._write({"begun": name})
            faulthandler.dump_traceback_later(seconds * (PATIENCE if self.tiny else 1), exit=True)
            try:
                run(name)
            except Exception as error:
                log.exception("%s", name)
                self.tell(name, ok=False, error=f"{type(error).__name__}: {in_a_line(str(error))}")
                self._check_device()
            finally:
                faulthandler.cancel_dump_traceback_later()
            self._write({"ended": name})

    def _check_device(self) -> None:
        if self.device == "cpu":
            return
        import torch

        try:
            torch.cuda.synchronize()
        except RuntimeError:  # an illegal address, for one: every later call would fail
            sys.exit(AGAIN)

    def _write(self, line: Report) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")


STEPS: Registry[Callable[[Job], None]] = Registry("step", "tinyllava_fast.bench.gpu_steps")


def in_a_line(text: str, most: int = 600) -> str:
    """Return a text without line breaks: its beginning and, of a long one such as a traceback, mostly its end."""
    line = " | ".join(part.strip() for part in text.splitlines() if part.strip())
    return line if len(line) <= most else f"{line[: most // 4]} ... {line[-(most - most // 4) :]}"


def work_folder(folder: Path) -> Path:
    """Return the folder of what only a run that goes on needs."""
    return folder / "work"


def rows_path(folder: Path, step: str) -> Path:
    """Return the file that a step writes its rows to."""
    return work_folder(folder) / f"{step}.jsonl"


def read_lines(path: Path) -> list[Report]:
    """Return the lines that are whole JSON objects: the last one may be cut, and a library may have written others."""
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def rows_of(lines: Iterable[Report]) -> dict[str, Report]:
    """Return {name: row}, the last one of each name."""
    return {line["row"]: {k: v for k, v in line.items() if k != "row"} for line in lines if "row" in line}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the step; returns the exit code."""
    parser = argparse.ArgumentParser(prog="tinyllava_fast.bench.gpu_job")
    parser.add_argument("step")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    setup_logging()
    try:
        STEPS.get(args.step)(Job(args.step, args.folder, tiny=args.tiny))
    except UserError as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    from tinyllava_fast.bench import gpu_job  # the module that steps register in; this one has another name

    sys.exit(gpu_job.main())
