"""Reports: of a trained and evaluated model (a page and a picture), and of an evaluation's scores (a page)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinyllava_fast.eval.report import html, png, scores
from tinyllava_fast.eval.report.data import gather

__all__ = ["write_report", "write_scores"]


def write_report(
    run_dir: str | Path, results_dir: str | Path, blind_dir: str | Path | None, *, note: str = ""
) -> tuple[Path, Path]:
    """Write report.html and report.png into run_dir; returns their paths. Arguments as in ``gather``."""
    run = Path(run_dir)
    blind = Path(blind_dir) if blind_dir is not None else None
    data = gather(run, Path(results_dir), blind, note=note)
    page, picture = run / "report.html", run / "report.png"
    page.write_text(html.page(data), encoding="utf-8", errors="replace")
    png.draw(data, picture)
    return page, picture


def write_scores(output: str | Path, benchmarks: Sequence[str]) -> Path:
    """Write output/report.html about the benchmarks' results in output/<name>; returns its path."""
    page = Path(output) / "report.html"
    text = scores.page([Path(output) / name for name in benchmarks])
    page.write_text(text, encoding="utf-8", errors="replace")  # a path need not be UTF-8
    return page
