"""The validation of a stage: what is looked at while it trains, how often, and which model stays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tinyllava_fast.config.ranges import (
    FilePath,
    Located,
    Named,
    NonNegativeInt,
    PositiveInt,
    Settings,
    ShareBelowOne,
    Text,
)
from tinyllava_fast.errors import UserError

LOSS = "loss"
"""The metric that is no benchmark's."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """A benchmark that is run at each validation, as tlf-eval runs it."""

    name: Annotated[Text, Named("benchmark")]
    """Registered benchmark; its headline is the score."""
    data: FilePath
    """Folder with the benchmark's files."""
    limit: PositiveInt | None = 200
    """Only the first so many questions; null: all of them."""
    options: Settings = field(default_factory=dict)
    """Settings of this benchmark alone."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Validation while a stage trains: give ``records`` or a ``share``, or benchmarks, or several of them."""

    records: Annotated[str, Located()] = ""
    """Records that are not trained on, in any form that data.records takes."""
    image_folder: Annotated[str, Located()] = ""
    """Folder that their image paths are relative to; empty: the stage's data.image_folder."""
    share: ShareBelowOne = 0.0
    """Share of the stage's own images whose records are held out instead: no picture is both trained on and validated
    with. Records without a picture are held out by their text."""
    every_steps: NonNegativeInt | None = None
    """Steps between validations; 0: only at the end. None: up to ten times in a stage, as far as they take no more
    than 2 % of its FLOPs."""
    max_packs: PositiveInt | None = None
    """Most packs that a validation reads, drawn at random, the same each time; None: all."""
    samples: NonNegativeInt = 8
    """Held-out questions that the model answers at each validation, for the run's page and the loggers."""
    max_new_tokens: PositiveInt = 32
    """Longest answer to one of them."""
    benchmarks: list[BenchmarkConfig] = field(default_factory=list)
    """Benchmarks run at each validation on the weights as they are then."""
    metric: Text = LOSS
    """The number that says which model is best: loss, or the name of one of the benchmarks."""
    keep: Literal["last", "best"] = "last"
    """The model that the stage ends with. best: by ``metric``, and the last one lies in output_dir/last."""
    patience: NonNegativeInt = 0
    """End the stage after so many validations in a row that were no better than the best; 0: never."""

    def check(self, where: str) -> None:
        """Raise UserError for keys that contradict each other. where: file and dotted key of the section."""
        if said := self._contradiction():
            raise UserError(f"{where}.{said}")

    def _contradiction(self) -> str:
        """Return a key and what is wrong with it beside the others; "" if nothing is."""
        if self.records and self.share:
            return "share: given beside records; validation has one source, keep one of the two"
        if self.image_folder and not self.records:
            return "image_folder: given without records; name the records, or leave it out"
        names = [benchmark.name for benchmark in self.benchmarks]
        if twin := next((name for name in names if names.count(name) > 1), ""):
            return f"benchmarks: {twin!r} is named twice; keep one of them"
        if self.metric != LOSS and self.metric not in names:
            known = ", ".join([LOSS, *names])
            return f"metric: {self.metric!r} is neither the loss nor one of the benchmarks; known: {known}"
        if self.metric == LOSS and not self.has_data and (self.keep == "best" or self.patience):
            what = "keep: best" if self.keep == "best" else f"patience: {self.patience}"
            return f"{what} goes by a validation loss, which needs records or a share: give one of them"
        return ""

    @property
    def has_data(self) -> bool:
        """Return whether there are records to take a loss of."""
        return bool(self.records) or self.share > 0

    @property
    def on(self) -> bool:
        """Return whether the stage is validated at all."""
        return self.has_data or bool(self.benchmarks)
