"""The two faces of a measurement: a table for people, JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tinyllava_fast.errors import UserError


def write_json(report: dict[str, Any], path: str | None) -> None:
    """Write a report to a file, or nothing if path is None. UserError if the file cannot be written."""
    write_text(json.dumps(report, indent=2, allow_nan=True) + "\n", path, "--json")


def write_text(text: str, path: str | Path | None, flag: str) -> None:
    """Write a file, or nothing if path is None. UserError naming the flag if the file cannot be written."""
    if path is None:
        return
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{flag} {path}: cannot write it ({error.strerror}); give a path in a folder of yours"
        ) from error


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None = None) -> None:
    """Print a table to standard output; the first column is left-aligned, the others right."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    if console is None:
        console = Console()
        if not console.is_terminal:
            console.width = 160  # a pipe or a log file has no width of its own; rich would fold at 80
    console.print(table)


def seconds(value: float) -> str:
    """A duration with three digits in its natural unit.

    >>> seconds(0.00123)
    '1.23 ms'
    """
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def quantity(value: float, unit: str) -> str:
    """A large number with a decimal prefix.

    >>> quantity(7.7e11, "FLOP/s")
    '770 GFLOP/s'
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
