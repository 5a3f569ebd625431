"""Weights & Biases: one run of theirs for a run of ours, in <run>/wandb. WANDB_MODE=offline needs no account."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import ModuleType

from tinyllava_fast.errors import UserError, import_optional
from tinyllava_fast.files import write_file
from tinyllava_fast.train.answers import SampleRow, picture
from tinyllava_fast.train.loggers.base import LOGGERS, Logged

NAME_FILE = "wandb-id"
"""The file in the run folder with the id of the run, so that a resumed one goes on."""
_SIDE = 512  # of the largest picture shown
COLUMNS = ["question", "answer now", "answer before", "truth"]


@LOGGERS.register("wandb")
class WandB:
    """Their settings come from their own variables: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, WANDB_NAME."""

    def __init__(self, run: Logged) -> None:
        self._wandb = _package()
        known = run.folder / NAME_FILE
        name = known.read_text(encoding="utf-8").strip() if run.after_step and known.is_file() else ""
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", "tinyllava-fast"),
                name=os.environ.get("WANDB_NAME", run.folder.resolve().name),
                dir=str(run.folder),
                id=name or None,
                resume="allow",
                config=dict(run.config),
            )
        except (self._wandb.Error, ValueError, RuntimeError, TimeoutError) as error:  # no key, no network, WANDB_*
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"loggers: wandb: its run could not begin: {reason}. Set "
                "WANDB_MODE=offline, which needs no account and no network, log in with `wandb login`, mend the WANDB_ "
                "variable that it names, or take wandb out of loggers"
            ) from error
        # Its own count of steps never goes back, which a run that is resumed from a checkpoint does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        write_file(known, f"{self._run.id}\n".encode())

    @classmethod
    def check(cls) -> None:
        """See Logger."""
        _package()

    def write(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """See Logger."""
        self._run.log({"step": step, **{f"{stage}/{name}": number for name, number in numbers.items()}})

    def samples(self, stage: str, step: int, rows: Sequence[SampleRow]) -> None:
        """See Logger."""
        table = self._wandb.Table(columns=["image", *COLUMNS])
        for row in rows:
            image = picture(row, _SIDE)
            shown = None if image is None else self._wandb.Image(image)
            table.add_data(shown, row["question"], row["now"], row["before"], row["truth"])
        self._run.log({"step": step, f"{stage}/validation/samples": table})

    def close(self) -> None:
        """See Logger."""
        self._run.finish()


def _package() -> ModuleType:
    return import_optional("wandb", "loggers: wandb", "wandb")
