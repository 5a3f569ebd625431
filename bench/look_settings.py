"""The settings of `tlf-bench look`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tinyllava_fast.bench.settings import Settings, option

QUESTIONS = ("open", "all")


@dataclass(frozen=True, kw_only=True)
class LookSettings(Settings):
    """The settings of `tlf-bench look`. Raises UserError for values that measure nothing."""

    quick_values: ClassVar = {"images": 4}

    images: int = option(200, "test images, one question about each")
    questions: str = option("open", "open: those that ask for a colour or a shape; all: also yes/no", names=QUESTIONS)
    fill: str = option("mean", "what replaces parts of a picture in the curves", names=("blank", "mean", "blur"))
    data: str = option("", "prepared easy-VQA folder; without one a temporary one is made")
    seed: int = option(0, "of the questions and of the random orders")
