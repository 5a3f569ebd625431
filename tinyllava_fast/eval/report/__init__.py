"""Reports of a trained and evaluated model: a self-contained HTML page and a picture."""

from __future__ import annotations

from pathlib import Path

from tinyllava_fast.eval.report import html, png
from tinyllava_fast.eval.report.data import gather

__all__ = ["write_report"]


def write_report(
    run_dir: str | Path, results_dir: str | Path, blind_dir: str | Path | None, data_dir: str | Path, *, note: str = ""
) -> tuple[Path, Path]:
    """Write report.html and report.png into run_dir; returns their paths. Arguments as in ``gather``."""
    run = Path(run_dir)
    blind = Path(blind_dir) if blind_dir is not None else None
    data = gather(run, Path(results_dir), blind, Path(data_dir), note=note)
    page, picture = run / "report.html", run / "report.png"
    page.write_text(html.page(data), encoding="utf-8")
    png.draw(data, picture)
    return page, picture
