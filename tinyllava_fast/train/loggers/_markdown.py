"""Samples as a table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tinyllava_fast.train.answers import SampleRow

_HEAD = "| # | question | answer now | answer before | truth |\n|---|---|---|---|---|"


def table(rows: Sequence[SampleRow]) -> str:
    """Return the samples, one a line; whatever a model says stays text."""
    lines = [_HEAD]
    for number, row in enumerate(rows):
        cells = [str(number), row["question"], row["now"], row["before"], row["truth"]]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(escape(text).replace("|", "\\|").split())
