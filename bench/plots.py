"""PNG plots of `--plot DIR`.

`tlf-bench ops`: time and memory of every candidate against size, one file an op. `tlf-bench scaling`: speed and memory
of the training step against its tokens. `tlf-bench infer`: answers a second and latency. `tlf-bench plan`: efficiency
and memory against the number of GPUs.

Each function that draws returns the files that it has written. UserError if matplotlib is not installed or the folder
cannot be written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_fast.bench.case import BOTH
from tinyllava_fast.bench.ops import Row
from tinyllava_fast.bench.report import Report
from tinyllava_fast.errors import UserError
from tinyllava_fast.eval.report.png import INK, LINE, SOFT, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = "#3155d4"
RIVALS = ("#b7791f", "#12805c", "#8a5cd1", "#c8372d", "#0e8f8f", "#667085")
MARKERS = "osD^vP"
Curves = dict[str, dict[str, list[tuple[float, Row]]]]


def draw(result: Report, folder: Path) -> list[Path]:
    """Write ops_<op>.png for each op whose rows lie on an axis."""
    written = []
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        if axes := curves(result, op):
            written.append(folder / f"ops_{op}.png")
            heading = f"{op}, forward and backward"
            with _figure(written[-1], (6.2 * len(axes), 8.2), heading, f"{result['dtype']}, ", result) as figure:
                _draw_curves(figure, axes)
    return written


def draw_scaling(result: Report, folder: Path) -> list[Path]:
    """Write scaling.png of a report of bench.scaling."""
    path, rows, memory = folder / "scaling.png", result["rows"], result["memory"]
    places = [row["tokens"] for row in rows]
    heading = f"A training step against its tokens ({result['settings']['mode']})"
    with _figure(path, (10.4, 4.6), heading, "", result) as figure:
        left, right = figure.subplots(1, 2)
        rates = [row["samples_per_s"] for row in rows]
        sizes = [row["peak_rss_bytes"] / 2**30 for row in rows]
        for panel, title, values in ((left, "samples/s", rates), (right, "peak memory (GiB)", sizes)):
            panel.plot(places, values, color=OURS, marker="o", linewidth=2.4)
            panel.set_xlim(0, 1.08 * max(places))
            panel.set_ylim(0, 1.25 * max(values))
            panel.set_xticks(places, [f"{place:,.0f}" for place in places])
            _plain(panel, title, "tokens a step")
        ends = [0.0, 1.05 * max(places)]
        fitted = [(memory["fixed"] + memory["per_token"] * x) / 2**30 for x in ends]
        label = f"{memory['fixed'] / 2**30:.2f} GiB + {memory['per_token'] / 2**10:.0f} KiB a token"
        right.plot(ends, fitted, color=SOFT, linewidth=1, linestyle="--", label=label)
        right.legend(loc="lower right", frameon=False, fontsize=9.5)
        figure.subplots_adjust(left=0.07, right=0.97, top=0.74, bottom=0.14, wspace=0.2)
    return [path]


def draw_infer(result: Report, folder: Path) -> list[Path]:
    """Write infer.png of a report of bench.infer."""
    path, settings, waits = folder / "infer.png", result["settings"], result["latency"]
    peers = {"ours": "tinyllava_fast", "batched": "transformers, 8 a batch", "batch1": "transformers, 1 a batch"}
    panels: dict[str, dict[str, float]] = {}
    for case, text in (("many_per_image", f"{settings['per_image']} an image"), ("one_per_image", "1 an image")):
        rates = result["questions_per_s"][case]
        panels[f"questions/s, {text}"] = {peers[side]: rate for side, rate in rates.items()}
    for kind, text in (("first", "ms to the first token"), ("next", "ms a token")):
        panels[text] = {peers[s]: 1e3 * waits[o][kind]["p50_s"] for s, o in (("ours", "ours"), ("batch1", "peer"))}
    weights = f", weights {settings['weights']}" if settings["weights"] else ""
    heading = f"Answers of {settings['new_tokens']} tokens, {settings['dtype']}{weights}"
    with _figure(path, (11.6, 6.2), heading, "", result) as figure:
        for panel, (title, values) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
            names = list(values)[::-1]
            colours = [OURS if name == peers["ours"] else SOFT for name in names]
            bars = panel.barh(names, [values[name] for name in names], color=colours, height=0.62)
            panel.bar_label(bars, [f"{values[name]:.1f}" for name in names], padding=4, fontsize=10)
            panel.margins(x=0.14)
            _plain(panel, title)
            panel.grid(visible=False)
            panel.set_xticks([])
        figure.subplots_adjust(left=0.17, right=0.97, top=0.82, bottom=0.04, hspace=0.42, wspace=0.5)
    return [path]


def draw_plan(result: Report, folder: Path) -> list[Path]:
    """Write plan.png of a report of bench.plan: efficiency and memory of each engine against the number of GPUs."""
    path, settings, device = folder / "plan.png", result["settings"], result["device"]
    heading = f"{settings['llm']} + {settings['vision']}, {settings['recipe']}, on {device['title']}: predicted"
    facts = f"{settings['packs']} pack(s) of {settings['tokens']:,} tokens a GPU and step; engines where they fit"
    engines = sorted({row["engine"] for row in result["curve"]} - {"torch"}, key=lambda name: (len(name), name))
    figures: tuple[tuple[str, Callable[[Report], float]], ...] = (
        ("efficiency (%)", lambda row: 100 * row["efficiency"]),
        ("memory a GPU (GiB)", lambda row: row["need"] / 2**30),
    )
    with _figure(path, (11.2, 4.8), heading, facts, result) as figure:
        for panel, (title, value) in zip(figure.subplots(1, 2), figures, strict=True):
            for name, colour, marker in zip(engines, (OURS, *RIVALS), (*MARKERS, "X"), strict=False):
                points = [(row["gpus"], value(row)) for row in result["curve"] if row["engine"] == name]
                panel.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=1.8, label=name)
            _plain(panel, title, "GPUs")
            if title != figures[0][0]:
                panel.axhline(device["memory"] / 2**30, color=SOFT, linewidth=1, linestyle="--")
            panel.set_ylim(bottom=0)
            panel.set_xscale("log", base=2)
            places = sorted({row["gpus"] for row in result["curve"]})[::2]
            panel.set_xticks(places, [f"{place:,}" for place in places])
        figure.legend(*panel.get_legend_handles_labels(), loc="lower center", ncol=7, frameon=False, fontsize=10)
        figure.subplots_adjust(left=0.06, right=0.97, top=0.76, bottom=0.2, wspace=0.16)
    return [path]


@contextlib.contextmanager
def _figure(path: Path, size: tuple[float, float], heading: str, facts: str, result: Report) -> Iterator[Figure]:
    """Yield a figure of that size in inches under a heading and the report's machine, if any; written at the end."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot needs matplotlib; run: pip install 'tinyllava-fast[eval]'") from error
    width, height = size
    if machine := result.get("machine"):
        cpu = f"{machine['cpu']} ({machine['threads']} threads)"
        facts += f"{machine['gpu'] if machine['device'].startswith('cuda') else cpu}, torch {machine['torch']}"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=110, facecolor="white")
        figure.text(0.48 / width, 1 - 0.32 / height, heading, fontsize=15, weight="bold", color=INK)
        figure.text(0.48 / width, 1 - 0.56 / height, facts, fontsize=9.5, color=SOFT)
        yield figure
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise UserError(
            f"--plot {path.parent}: cannot write there ({error.strerror}); give a folder of yours"
        ) from error


def curves(result: Report, op: str) -> Curves:
    """Return {axis: {candidate: [(place, row), ...] ascending}} of the op's forward+backward rows.

    Axes have two or more sizes; a candidate that was run at one size of the axis only is left out.
    """
    found: Curves = {}
    for row in result["rows"]:
        if row["op"] == op and row["pass"] == BOTH:
            for axis, place in row["axes"].items():
                for name in row["medians"]:
                    found.setdefault(axis, {}).setdefault(name, []).append((place, row))
    drawn = {
        axis: {name: sorted(points, key=lambda p: p[0]) for name, points in lines.items() if len(points) > 1}
        for axis, lines in found.items()
    }
    return {axis: lines for axis, lines in drawn.items() if lines}


def _draw_curves(figure: Figure, axes: Curves) -> None:
    rivals = dict.fromkeys(name for lines in axes.values() for name in lines if name != "ours")
    looks = {name: (RIVALS[i % len(RIVALS)], MARKERS[i % len(MARKERS)], 1.4) for i, name in enumerate(rivals)}
    looks["ours"] = (OURS, "o", 2.6)
    figures = (("time (ms)", _milliseconds), ("peak extra memory (MB)", _megabytes))
    grid = figure.subplots(2, len(axes), squeeze=False)
    for column, (axis, lines) in enumerate(axes.items()):
        for panel, (title, value) in zip(grid[:, column], figures, strict=True):
            for name, (colour, marker, width) in looks.items():
                points = [(x, value(row, name)) for x, row in lines.get(name, ()) if value(row, name)]
                if points:
                    panel.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=width, label=name)
            _logarithmic(panel, sorted({x for points in lines.values() for x, _ in points}))
            _plain(panel, title, axis)
    handles = {h.get_label(): h for panel in grid.flat for h in panel.get_lines()}
    figure.legend(
        handles.values(), handles.keys(), loc="lower center", ncol=min(4, len(handles)), frameon=False, fontsize=10
    )
    figure.subplots_adjust(
        left=0.5 / (6.2 * len(axes)) + 0.03, right=0.97, top=0.88, bottom=0.13, hspace=0.42, wspace=0.22
    )


def _logarithmic(panel: Axes, places: list[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.xaxis.set_major_locator(FixedLocator(places))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_locator(NullLocator())
    panel.margins(y=0.12)


def _plain(panel: Axes, title: str, axis: str = "") -> None:
    panel.set_title(title, fontsize=11.5, loc="left", pad=8, weight="bold")
    panel.set_xlabel(axis, fontsize=9.5, color=SOFT)
    panel.tick_params(length=0, colors=SOFT, labelsize=9)
    panel.grid(axis="y", color=LINE, linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)


def _milliseconds(row: Row, name: str) -> float:
    return 1e3 * row["medians"][name]


def _megabytes(row: Row, name: str) -> float:
    return (row["peak_bytes"][name] or 0) / 1e6
