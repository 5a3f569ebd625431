"""`tlf-bench ops --compare FILE`: this run against a former one, row by row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from tinyllava_fast.bench import report
from tinyllava_fast.bench.ops import FORMAT, Row
from tinyllava_fast.bench.report import Report
from tinyllava_fast.errors import UserError

TOLERANCE = 0.15
SAME = ("device", "cpu", "gpu", "cores", "threads", "isa_torch", "isa_tlf")
"""Facts that make a machine the same one for timings. Versions may differ: they are what one compares."""


def read_baseline(path: str, anyway: bool = False) -> Report:
    """Return the results file of `tlf-bench ops --json`.

    UserError if it cannot be read or is of another format; anyway: take another format if it has the rows' fields.
    """
    try:
        baseline: Report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--compare {path}: cannot read it ({error}); give a file that --json wrote") from error
    found = baseline.get("format", "none") if isinstance(baseline, dict) else "none"
    if found != FORMAT and not anyway:
        raise UserError(f"--compare {path}: format {found!r}, expected {FORMAT!r}; --compare-anyway takes it as it is")
    rows = baseline.get("rows") if isinstance(baseline, dict) else None
    needed = ("op", "shape", "pass", "medians", "spread")
    if not isinstance(rows, list) or not all(isinstance(r, dict) and all(k in r for k in needed) for r in rows):
        raise UserError(f"--compare {path}: it has no rows with {', '.join(needed)}; give a file of `tlf-bench ops`")
    return baseline


def check_same_machine(baseline: Report, facts: Mapping[str, object], dtype: str, path: str) -> None:
    """Raise a UserError that names what differs between the baseline's machine or dtype and this run's."""
    theirs = {**baseline.get("machine", {}), "dtype": baseline.get("dtype")}
    ours = {**facts, "dtype": dtype}
    differ = [
        f"{k} is {ours.get(k)!r}, there {theirs.get(k)!r}" for k in (*SAME, "dtype") if ours.get(k) != theirs.get(k)
    ]
    if differ:
        raise UserError(f"--compare {path}: not the same machine: {'; '.join(differ)}; --compare-anyway compares them")


def compare(result: Report, baseline: Report) -> list[Report]:
    """Return one entry for each row of the result: op, shape, pass, and what changed where the baseline has it too.

    That is before and after (medians of ours in seconds), ratio (above 1: faster now), noise (relative spread of both),
    slower.

    slower: the median grew by more than TOLERANCE and by more than either's spread between quartiles.
    """
    former = {_key(row): row for row in baseline["rows"] if "ours" in row["medians"]}
    found = []
    for row in result["rows"]:
        entry: Report = {k: row[k] for k in ("op", "shape", "pass")}
        old = former.get(_key(row))
        if old is not None:
            before, after = old["medians"]["ours"], row["medians"]["ours"]
            spreads = [r["spread"]["ours"][1] - r["spread"]["ours"][0] for r in (old, row)]
            entry |= {
                "before": before,
                "after": after,
                "ratio": before / after,
                "noise": (spreads[0] / before, spreads[1] / after),
                "slower": after > before * (1 + TOLERANCE) and after - before > max(spreads),
            }
        found.append(entry)
    return found


def show(entries: Iterable[Report], path: str) -> None:
    """Print one line a row; those that became slower say so."""
    figures = {
        "before": "{before:time}",
        "now": "{after:time}",
        "faster by": "{ratio:.2f}x",
        "noise before / now": "{noise[0]:.0 %} / {noise[1]:.0 %}",
    }
    lines = []
    for e in entries:
        found = "ratio" in e
        cells = [report.fill(text, e) if found else "" for text in figures.values()]
        verdict = "not in the baseline" if not found else "SLOWER" if e["slower"] else ""
        lines.append([*_key(e), *cells, verdict])
    report.show(f"Against {path}", ["op", "shape", "pass", *figures, ""], lines)


def _key(row: Row | Report) -> tuple[str, str, str]:
    return row["op"], row["shape"], row["pass"]
