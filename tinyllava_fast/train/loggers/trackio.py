"""trackio: a local SQLite file for `trackio show`, in <run>/trackio unless TRACKIO_DIR names another folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from types import ModuleType

from tinyllava_fast.errors import import_optional
from tinyllava_fast.train.answers import SampleRow
from tinyllava_fast.train.loggers._markdown import table
from tinyllava_fast.train.loggers.base import LOGGERS, Logged

PROJECT = "tinyllava-fast"
FOLDER = "trackio"


@LOGGERS.register("trackio")
class Trackio:
    """A run of the project ``tinyllava-fast``, named after the run folder."""

    def __init__(self, run: Logged) -> None:
        os.environ.setdefault("TRACKIO_DIR", str((run.folder / FOLDER).resolve()))  # read when it is imported
        self._trackio = _package()
        with redirect_stdout(sys.stderr):
            self._run = self._trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=run.folder.resolve().name,
                config=dict(run.config),
                resume="allow" if run.after_step else "never",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    @classmethod
    def check(cls) -> None:
        """See Logger. Not imported before its folder is known."""
        from importlib.util import find_spec

        if find_spec("trackio") is None:
            _package()

    def write(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """See Logger."""
        self._run.log({f"{stage}/{name}": number for name, number in numbers.items()}, step=step)

    def samples(self, stage: str, step: int, rows: Sequence[SampleRow]) -> None:
        """See Logger: the texts alone."""
        self._run.log({f"{stage}/validation/samples": self._trackio.Markdown(table(rows))}, step=step)

    def close(self) -> None:
        """See Logger."""
        with redirect_stdout(sys.stderr):
            self._run.finish()


def _package() -> ModuleType:
    return import_optional("trackio", "loggers: trackio", "trackio")
