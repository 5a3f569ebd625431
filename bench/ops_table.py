"""The report of `tlf-bench ops` for people."""

from __future__ import annotations

from tinyllava_fast.bench import report
from tinyllava_fast.bench.ops import Row
from tinyllava_fast.bench.report import Report

COLUMNS = ["candidate", "median", "quartiles", "work", "traffic", "of roof", "peak", "saved", "ours faster by"]


def show(result: Report) -> None:
    """Print one table an op, a block of lines for each shape and pass; then the headline and who is absent."""
    facts = "{dtype}, {machine[threads]} threads; roof: {roof[flops_per_s]:FLOP/s}, {roof[bytes_per_s]:B/s}"
    facts = report.fill(facts, result)
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        lines: list[list[str]] = []
        for row in (r for r in result["rows"] if r["op"] == op):
            lines.append([f"{row['shape']}  {row['pass']}"] + [""] * (len(COLUMNS) - 1))
            lines += [_line(row, name) for name in row["medians"]]
        report.show(f"{op}, {facts}", COLUMNS, lines)
    if result["headline"]:
        lines = [[key, f"{ratio:.2f}x"] for key, ratio in result["headline"].items()]
        report.show("Headline", ["forward and backward", "ours is better by"], lines)
    absent = [[op, name, why] for op, reasons in result["absent"].items() for name, why in reasons.items()]
    if absent:
        report.show("Not in the race", ["op", "candidate", "reason"], absent)


def _line(row: Row, name: str) -> list[str]:
    low, high = row["spread"][name]
    peak, saved = row["peak_bytes"].get(name), row["saved_bytes"].get(name)
    return [
        f"  {name}",
        report.seconds(row["medians"][name]),
        f"{report.seconds(low)} .. {report.seconds(high)}",
        report.quantity(row["flops_per_s"][name], "FLOP/s") if row["flops"] else "",
        report.quantity(row["bytes_per_s"][name], "B/s") if row["bytes"] else "",
        f"{100 * row['roofline'][name]:.0f} %" if row["bytes"] else "",
        "" if peak is None else report.quantity(peak, "B"),
        "" if saved is None else report.quantity(saved, "B"),
        "" if name == "ours" else f"{row['ratio'][name]['ratio']:.2f}x",
    ]
