"""Where a run's numbers are shown besides its own folder. A logger is one file here and its name in ``loggers:``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tinyllava_fast.registry import Registry
from tinyllava_fast.train.answers import SampleRow


@dataclass(frozen=True)
class Logged:
    """The run that is shown. after_step: it goes on behind that step, so what was shown of later ones is void."""

    folder: Path
    config: Mapping[str, object]
    after_step: int = 0


class Logger(Protocol):
    """Shows numbers and samples of a run. OSErrors may pass: the caller says which run could not be written."""

    def __init__(self, run: Logged) -> None:
        """Open it; UserError if it cannot be used."""
        ...

    @classmethod
    def check(cls) -> None:
        """Raise UserError, before anything is prepared, if what it needs is not installed."""
        ...

    def write(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """Show numbers by their names, "train/loss", at a step of the run."""
        ...

    def samples(self, stage: str, step: int, rows: Sequence[SampleRow]) -> None:
        """Show the answers to the samples at a step of the run."""
        ...

    def close(self) -> None:
        """Write what is held back and let go of everything."""
        ...


LOGGERS: Registry[type[Logger]] = Registry("logger", "tinyllava_fast.train.loggers")
