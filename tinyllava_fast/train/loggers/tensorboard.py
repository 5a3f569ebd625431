"""TensorBoard: <run>/tensorboard/<stage>, over the steps of the whole run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tinyllava_fast.log import log
from tinyllava_fast.train.answers import SampleRow, picture
from tinyllava_fast.train.loggers._markdown import table
from tinyllava_fast.train.loggers.base import LOGGERS, Logged

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
_SIDE = 256  # of the largest picture shown


@LOGGERS.register("tensorboard")
class TensorBoard:
    """Events, one folder a stage. Without the package there are none, and a warning."""

    def __init__(self, run: Logged) -> None:
        self._run = run
        self._events: dict[str, SummaryWriter | None] = {}  # of each stage; None: TensorBoard is not installed
        self._pictured: set[str] = set()  # stages whose pictures are there

    @classmethod
    def check(cls) -> None:
        """See Logger. It is the default, so a missing package costs nothing but the events."""

    def write(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """See Logger."""
        if (events := self._of(stage)) is not None:
            for name, number in numbers.items():
                events.add_scalar(name, number, step)

    def samples(self, stage: str, step: int, rows: Sequence[SampleRow]) -> None:
        """See Logger: a table as text at each step, the pictures once."""
        if (events := self._of(stage)) is None:
            return
        events.add_text("validation/samples", table(rows), step)
        if stage in self._pictured:
            return
        self._pictured.add(stage)
        for number, row in enumerate(rows):
            if (image := picture(row, _SIDE)) is not None:
                events.add_image(f"samples/{number}", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """See Logger."""
        for events in self._events.values():
            if events is not None:
                events.close()

    def _of(self, stage: str) -> SummaryWriter | None:
        if stage not in self._events:
            self._events[stage] = _open(self._run, stage)
        return self._events[stage]


def _open(run: Logged, stage: str) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning("no TensorBoard events: tensorboard is not installed (pip install 'tinyllava-fast[train]')")
        return None
    return SummaryWriter(str(run.folder / FOLDER / stage), purge_step=run.after_step + 1 if run.after_step else None)
