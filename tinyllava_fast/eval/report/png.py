"""The report as one picture: loss curve, accuracy bars and image grid."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_fast.data.images import load_image
from tinyllava_fast.errors import UserError
from tinyllava_fast.eval.report.data import ReportData
from tinyllava_fast.eval.report.html import duration, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

INK, SOFT, LINE, MODEL, BLIND = "#1b1f2a", "#667085", "#e4e7ec", "#3155d4", "#b6bdcc"
RIGHT, WRONG = "#12805c", "#c8372d"
STAGES = ("#8a5cd1", "#3155d4", "#0e8f8f", "#b7791f")
COLUMNS = 8
STYLE: dict[RcKeyType, str] = {
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": LINE,
    "text.hinting": "none",
}


def draw(data: ReportData, path: Path) -> None:
    """Write the picture. Raises UserError if matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("report.png needs matplotlib; run: pip install 'tinyllava-fast[eval]'") from error
    rows = -(-len(data.shots) // COLUMNS)
    with matplotlib.rc_context(STYLE):
        height = 5.4 + 1.95 * rows
        figure = Figure(figsize=(14, height), dpi=110, facecolor="white")
        _title(figure, data, height)
        top = 1 - 1.25 / height
        panel = 3.1 / height
        _loss(figure.add_axes((0.05, top - panel, 0.42, panel)), data)
        _bars(figure.add_axes((0.6, top - panel, 0.37, panel)), data)
        _grid(figure, data, rows, bottom=0.25 / height, top=top - panel - 0.75 / height)
        figure.savefig(path)


def _title(figure: Figure, data: ReportData, height: float) -> None:
    run, s = data.seen.run, data.summary
    head = f"{100 * data.seen.accuracy:.1f} % of {data.seen.results['questions']:,} test questions right"
    if data.blind:
        head += f"  (blind: {100 * data.blind.accuracy:.1f} %)"
    facts = [f"{data.title}, {data.seen.results['benchmark']}"]
    if s:
        facts.append(f"trained in {duration(s['train_seconds'])} at {s['samples_per_s']:,.0f} samples/s")
    facts.append(f"evaluated in {duration(run['eval_seconds'])} at {run['questions_per_s']:,.0f} questions/s")
    facts.append(f"peak memory {size(data.peak_rss_bytes)}")
    figure.text(0.05, 1 - 0.48 / height, head, fontsize=21, weight="bold")
    figure.text(0.05, 1 - 0.80 / height, "   ·   ".join(facts), fontsize=10.5, color=SOFT)


def _loss(axes: Axes, data: ReportData) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for i, curve in enumerate(data.curves):
        colour = STAGES[i % len(STAGES)]
        axes.plot(curve.steps, curve.losses, color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(curve.steps, curve.smooth, color=colour, linewidth=2, label=curve.stage)
    if data.curves:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.legend(frameon=False, fontsize=9)
    _plain(axes, "training loss (logarithmic)")
    axes.set_xlabel("step", fontsize=9, color=SOFT)
    axes.grid(axis="y", color=LINE, linewidth=0.8)


def _bars(axes: Axes, data: ReportData) -> None:
    for y, (_, _, accuracy, blind) in enumerate(reversed(data.rows)):
        axes.barh(y + 0.16, accuracy, height=0.34, color=MODEL)
        axes.text(accuracy + 0.012, y + 0.16, f"{100 * accuracy:.1f} %", va="center", fontsize=9.5, weight="bold")
        if blind is not None:
            axes.barh(y - 0.22, blind, height=0.26, color=BLIND)
            axes.text(blind + 0.012, y - 0.22, f"{100 * blind:.1f} %", va="center", fontsize=8.5, color=SOFT)
    axes.set_yticks(range(len(data.rows)))
    axes.set_yticklabels([f"{kind}  ({count:,})" for kind, count, *_ in reversed(data.rows)], fontsize=9.5)
    axes.set_xlim(0, 1.12)
    axes.set_xticks([])
    _plain(axes, "accuracy by question type" + (" (grey: blank images)" if data.blind else ""))


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11.5, loc="left", pad=10, weight="bold")
    axes.tick_params(length=0, colors=SOFT, labelsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _grid(figure: Figure, data: ReportData, rows: int, *, bottom: float, top: float) -> None:
    right = sum(s.right for s in data.shots)
    head = f"{len(data.shots)} questions drawn at random: {right} right, {len(data.shots) - right} wrong"
    figure.text(0.05, top + 0.012, head, fontsize=11.5, weight="bold")
    width, height = 0.92 / COLUMNS, (top - bottom) / max(rows, 1)
    for i, shot in enumerate(data.shots):
        left, low = 0.05 + width * (i % COLUMNS), top - height * (i // COLUMNS + 1)
        axes = figure.add_axes((left, low + 0.36 * height, 0.9 * width, 0.58 * height))
        axes.imshow(load_image(shot.image), interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        colour = RIGHT if shot.right else WRONG
        for spine in axes.spines.values():
            spine.set(color=colour, linewidth=2)
        centre = left + 0.45 * width
        said = shot.answer or "(nothing)"
        figure.text(
            centre, low + 0.27 * height, _wrapped(shot.question), fontsize=8, color=SOFT, ha="center", va="center"
        )
        verdict = f"✓ {said}" if shot.right else f"✗ {said}  (truth: {shot.truth})"
        figure.text(
            centre,
            low + 0.1 * height,
            verdict,
            fontsize=8.6 if shot.right else 8,
            color=colour,
            ha="center",
            va="center",
            weight="bold",
        )


def _wrapped(text: str, width: int = 26) -> str:
    """At most two lines."""
    if len(text) <= width:
        return text
    cut = text.rfind(" ", 0, width)
    rest = text[cut + 1 :]
    return f"{text[:cut]}\n{rest if len(rest) <= width else rest[: width - 1] + '…'}"
