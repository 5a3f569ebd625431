"""Charts as inline SVG: sharp at any size, styled by the page's CSS, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tinyllava_fast.eval.report.data import Curve
from tinyllava_fast.eval.types import Histogram
from tinyllava_fast.page import columns

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 22, 30, 40


@dataclass(frozen=True)
class Line:
    """A line of a chart. style: "line", bold; "raw", pale. colour: 0 to 3. name: in the legend; "" is in none."""

    xs: Sequence[float]
    ys: Sequence[float]
    colour: int = 0
    style: str = "line"
    name: str = ""


def loss_chart(curves: Sequence[Curve]) -> str:
    """Training loss over steps on a logarithmic scale: raw values pale, their exponential mean bold, stages marked."""
    styles = ("raw", "line")
    lines = [
        Line(c.steps, ys, i % 4, style)
        for i, c in enumerate(curves)
        for style, ys in zip(styles, (c.losses, c.smooth), strict=True)
    ]
    stages = [(c.stage, c.steps[-1]) for c in curves]
    return (
        line_chart(lines, "training loss", stages, log=True) or '<p class="note">No training metrics in this run.</p>'
    )


def line_chart(lines: Sequence[Line], label: str, stages: Sequence[tuple[str, int]] = (), *, log: bool = False) -> str:
    """Draw lines over the steps of a run; "" if there is nothing to draw.

    label: what they show. stages: names and last steps. log: a logarithmic scale, on which only positive values lie.
    """
    points = [(x, y) for line in lines for x, y in zip(line.xs, line.ys, strict=True) if y > 0 or not log]
    if not points:
        return ""
    last = max(max(x for x, _ in points), *(step for _, step in stages), 1)
    values = [y for _, y in points]
    low, high = _decades(min(values), max(values)) if log else _around(min(values), max(values))
    scaled = math.log10 if log else float
    ticks = _log_ticks(low, high) if log else _even_ticks(low, high)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(value: float) -> float:
        share = (scaled(max(value, low)) - scaled(low)) / (scaled(high) - scaled(low))
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _linear_ticks(int(last)):
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - 20}" text-anchor="middle">{tick:,}</text>')
    parts.append(
        f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">step</text>'
    )
    begin = 0
    for i, (stage, end) in enumerate(stages):
        if i:
            parts.append(
                f'<line class="stage" x1="{x(begin):.1f}" x2="{x(begin):.1f}" y1="{TOP - 8}" y2="{HEIGHT - BOTTOM}"/>'
            )
        middle = x((begin + end) / 2)
        parts.append(f'<text class="label" x="{middle:.1f}" y="{TOP - 12}" text-anchor="middle">{escape(stage)}</text>')
        begin = end
    for line in lines:
        path = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(line.xs, line.ys, strict=True))
        parts.append(f'<polyline class="{line.style} s{line.colour % 4}" points="{path}"/>')
    parts.append("</svg>")
    named = [f'<span class="s{line.colour % 4}">{escape(line.name)}</span>' for line in lines if line.name]
    return "\n".join([*parts, *([f'<p class="legend">{" ".join(named)}</p>'] if named else [])])


def histogram(summary: Histogram) -> str:
    """Draw what eval.statistics.histogram counted as columns, its percentiles written out; values are seconds."""
    said = "seconds; " + ", ".join(f"{name} {summary[name]:.3g}" for name in ("p50", "p95", "p99"))
    ticks = [f"{share * summary['max']:.3g}" for share in (0, 0.5, 1)]
    return columns(summary["bins"], ticks, "answer times", said)


def _decades(low: float, high: float) -> tuple[float, float]:
    """Bounds that enclose the values with a little room, at least a factor of two apart."""
    return low / 1.15, max(high * 1.15, low * 2)


def _around(low: float, high: float) -> tuple[float, float]:
    """Bounds of a linear scale that enclose the values with a little room, also where they are all the same."""
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room if low < 0 or low > room else 0.0, high + room


def _even_ticks(low: float, high: float, about: int = 5) -> list[float]:
    raw = (high - low) / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
    first = math.ceil(low / step)
    return [round(n * step, 12) for n in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    steps = (1, 2, 5) if high / low < 1000 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [t for d in decades for m in steps if low <= (t := round(m * 10.0**d, 10)) <= high]
    return found if len(found) > 2 else _even_ticks(low, high)  # less than a decade


def _linear_ticks(last: int, about: int = 6) -> list[int]:
    raw = max(last / about, 1)
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
    return list(range(0, last + 1, int(step)))
