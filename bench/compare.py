"""`tlf-bench ops --compare FILE`: this run against a former one, row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinyllava_fast.bench import report
from tinyllava_fast.bench.ops import FORMAT
from tinyllava_fast.errors import UserError

TOLERANCE = 0.15
SAME = ("device", "cpu", "gpu", "cores", "threads", "isa_torch", "isa_tlf")
"""Facts that make a machine the same one for timings. Versions may differ: they are what one compares."""


def read_baseline(path: str, anyway: bool = False) -> dict[str, Any]:
    """A results file of `tlf-bench ops --json`.

    UserError if it cannot be read or is of another format; anyway: take another format if it has the rows' fields.
    """
    try:
        baseline: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
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


def check_same_machine(baseline: dict[str, Any], facts: dict[str, Any], dtype: str, path: str) -> None:
    """UserError that names what differs between the baseline's machine or dtype and this run's."""
    theirs = {**baseline.get("machine", {}), "dtype": baseline.get("dtype")}
    ours = {**facts, "dtype": dtype}
    differ = [
        f"{k} is {ours.get(k)!r}, there {theirs.get(k)!r}" for k in (*SAME, "dtype") if ours.get(k) != theirs.get(k)
    ]
    if differ:
        raise UserError(f"--compare {path}: not the same machine: {'; '.join(differ)}; --compare-anyway compares them")


def compare(result: dict[str, Any], baseline: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each row of the result: op, shape, pass, and where the baseline has the row also before and after
    (medians of ours in seconds), ratio (above 1: faster now), noise (relative spread of before and after), slower.

    slower: the median grew by more than TOLERANCE and by more than either's spread between quartiles.
    """
    former = {_key(row): row for row in baseline["rows"] if "ours" in row["medians"]}
    found = []
    for row in result["rows"]:
        entry: dict[str, Any] = {k: row[k] for k in ("op", "shape", "pass")}
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


def show(entries: list[dict[str, Any]], path: str) -> None:
    """One line a row; those that became slower say so."""
    lines = []
    for e in entries:
        where = [e["op"], e["shape"], e["pass"]]
        if "ratio" not in e:
            lines.append([*where, "", "", "", "", "not in the baseline"])
            continue
        noise = f"{100 * e['noise'][0]:.0f} % / {100 * e['noise'][1]:.0f} %"
        times = [report.seconds(e["before"]), report.seconds(e["after"])]
        lines.append([*where, *times, f"{e['ratio']:.2f}x", noise, "SLOWER" if e["slower"] else ""])
    columns = ["op", "shape", "pass", "before", "now", "faster by", "noise before / now", ""]
    report.show(f"Against {path}", columns, lines)


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["op"], row["shape"], row["pass"]
