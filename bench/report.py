"""The two faces of a measurement: a table for people, JSON for machines."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

from tinyllava_fast.errors import UserError

Report: TypeAlias = dict[str, Any]
"""A report, or a part of one, as it becomes JSON; the function that makes it says its keys."""


def write_json(report: Mapping[str, object], path: str | None) -> None:
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


class _Units(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        """As of format(), and "time", "GiB", ".1 %", and the units that ``quantity`` takes."""
        if format_spec == "time":
            return seconds(value)
        if format_spec == "GiB":
            return f"{value / 2**30:.2f} GiB"
        if format_spec.endswith(" %"):
            return f"{100 * value:{format_spec[:-2]}f} %"
        if format_spec in ("FLOP/s", "B/s", "B"):
            return quantity(value, format_spec)
        return format(value, format_spec)


def fill(template: str, values: Mapping[str, object]) -> str:
    """Return the template with the values put in, as str.format does it, with the units of our tables.

    >>> fill("{step[median_s]:time}, {share:.0 %}", {"step": {"median_s": 0.00123}, "share": 0.5})
    '1.23 ms, 50 %'
    """
    return _Units().vformat(template, (), values)


def table(title: str, columns: Mapping[str, str], rows: Iterable[Mapping[str, object]]) -> None:
    """Print a table of which each column is a template that is filled from each row."""
    show(title, list(columns), [[fill(template, row) for template in columns.values()] for row in rows])


def seconds(value: float) -> str:
    """Return a duration with three digits in its natural unit.

    >>> seconds(0.00123)
    '1.23 ms'
    """
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def quantity(value: float, unit: str) -> str:
    """Return a large number with a decimal prefix.

    >>> quantity(7.7e11, "FLOP/s")
    '770 GFLOP/s'
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
