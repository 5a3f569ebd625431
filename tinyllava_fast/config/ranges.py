"""Limits of a number or a text, said beside its type: ``lr: PositiveFloat``, ``Annotated[int, Range(least=1)]``.

A mark holds for every number (or text) inside the type that it annotates, those of lists, tuples and mappings too. It
is checked where a value is read (config/values.py) and shown by ``tlf-train --help``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

LARGEST_INT = 2**31 - 1  # of every whole number that names no largest value: what counters in C++ and torch hold
LARGEST_FLOAT = 3.4028234663852886e38  # of every number: float32's, in which training computes


@dataclass(frozen=True)
class Range:
    """Bounds of a finite number. least, most: allowed themselves; above, below: not. why: what to do instead."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    why: str = ""

    def holds(self, number: float) -> bool:
        """Return True if the number is inside."""
        return (
            (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        """Return the bounds in words: "from 0 to 1", "of at least 1", "above 0 and below 1"; "" without any."""
        if self.least is not None and self.most is not None:
            return f"from {self.least:.10g} to {self.most:.10g}"
        bounds = (("of at least", self.least), ("above", self.above), ("of at most", self.most), ("below", self.below))
        return " and ".join(f"{word} {bound:.10g}" for word, bound in bounds if bound is not None)


@dataclass(frozen=True)
class Filled:
    """A text that is not empty."""


@dataclass(frozen=True)
class Named:
    """A text that is the name of a registered component. kind: of its registry, such as "connector"."""

    kind: str


@dataclass(frozen=True)
class Located:
    """A text that is a path: ``~`` at its beginning stands for the home folder."""


FINITE = Range()

PositiveInt = Annotated[int, Range(least=1)]
NonNegativeInt = Annotated[int, Range(least=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(least=0, most=1)]
ShareBelowOne = Annotated[float, Range(least=0, below=1)]
Size = Annotated[int, Range(least=1, most=2**24)]
"""A width, a vocabulary or the like. Larger ones are slips that would fill the memory before anything fails."""
Pixels = Annotated[int, Range(least=1, most=2**14)]
"""A side of an image or a patch."""
Layers = Annotated[int, Range(least=1, most=4096)]
Text = Annotated[str, Filled()]
FilePath = Annotated[str, Filled(), Located()]
Settings = Annotated[dict[str, Any], FINITE]
"""Free-form settings; nan and infinity are refused at any depth."""


def fault(kind: Literal["int", "float"], number: int | float, allowed: Range) -> str:
    """Return a noun phrase for the numbers that are allowed if this one is not; "" if it is."""
    noun = "a whole number" if kind == "int" else "a number"
    largest = LARGEST_INT if kind == "int" else LARGEST_FLOAT
    if isinstance(number, float) and not math.isfinite(number):
        return f"{noun} {allowed}" if str(allowed) else f"{noun} that is finite"
    if not allowed.holds(number):
        return f"{noun} {allowed}"
    if allowed.most is None and number > largest:
        return f"{noun} of at most {largest:.10g}"
    if allowed.least is None and allowed.above is None and number < -largest:
        return f"{noun} of at least {-largest:.10g}"
    return ""
