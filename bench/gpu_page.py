"""The report of `tlf-bench gpu` as a page of Markdown."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping

from tinyllava_fast.bench import report
from tinyllava_fast.bench.report import Report
from tinyllava_fast.version import __version__

LONG = ("losses", "seconds", "warmup_s", "ours", "reference", "spread", "changes", "wrong")
"""Values that only the JSON shows."""
MOST_ROWS = 60


def versions() -> dict[str, str]:
    """Return what this process runs on."""
    return {"tinyllava_fast": __version__, "python": platform.python_version(), "host": platform.platform()}


def page(result: Report) -> str:
    """Return the page: the steps, what is wrong, and a table of rows for each step."""
    minutes, dry = result["settings"]["minutes"], result["settings"]["dry_run"]
    lines = ["# GPU run", "", f"{result['seconds']:.0f} s of at most {minutes:g} minutes, by `tlf-bench gpu`."]
    if dry:
        lines.append("**A dry run on a CPU, with tiny shapes: its numbers mean nothing.**")
    columns = ["step", "status", "seconds", "rows", "problems", "error"]
    steps = [
        [s["name"], s["status"], f"{s['seconds']:.0f}", str(len(s["rows"])), str(s["problems"]), s["error"]]
        for s in result["steps"]
    ]
    lines += ["", *table(columns, steps)]
    wrong = [[s["name"], name, _why(row)] for s in result["steps"] for name, row in s["rows"].items() if _bad(row)]
    wrong += [[s["name"], name, "its process ended"] for s in result["steps"] for name in s["crashed"]]
    if wrong:
        lines += ["", "## What is wrong", "", *table(["step", "row", "why"], wrong)]
    for step in result["steps"]:
        if step["rows"]:
            lines += ["", f"## {step['name']}", "", *_rows(step["rows"])]
    return "\n".join(lines) + "\n"


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    head = list(columns)
    clean = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *clean]]


def _bad(row: Report) -> bool:
    return row.get("ok") is False


def _why(row: Report) -> str:
    return str(row.get("error") or {k: v for k, v in row.items() if k not in ("ok", *LONG)})[:300]


def _rows(rows: Mapping[str, Report]) -> list[str]:
    """Return the table of a step's rows: first what is wrong; a row of candidates becomes a line each."""
    flat: dict[str, Mapping[str, object]] = {}
    for name, row in rows.items():
        medians = row.get("medians")
        if isinstance(medians, Mapping):
            for candidate, seconds in medians.items():
                line: dict[str, object] = {"ms": 1e3 * seconds, "of roof": row["roofline"].get(candidate)}
                if candidate == "ours" and row.get("predicted_s"):
                    line["predicted ms"] = 1e3 * row["predicted_s"]
                flat[f"{name}: {candidate}"] = line
        else:
            flat[name] = {k: v for k, v in row.items() if k not in LONG}
    ordered = sorted(flat.items(), key=lambda item: item[1].get("ok") is not False)
    shown = ordered[:MOST_ROWS]
    columns = list(dict.fromkeys(key for _, row in shown for key in row))
    lines = table(["", *columns], [[name, *(_cell(row.get(key), key) for key in columns)] for name, row in shown])
    return lines if len(ordered) == len(shown) else [*lines, "", f"{len(ordered) - len(shown)} more rows in gpu.json."]


def _cell(value: object, key: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, (int, float)) and key.endswith("bytes"):
        return report.quantity(value, "B")
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)[:160]
