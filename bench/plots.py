"""PNG plots of `--plot DIR`.

`tlf-bench ops`: time and memory of every candidate against size, one file an op. `tlf-bench scaling`: speed and memory
of the training step against its tokens. `tlf-bench infer`: answers a second and latency.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllava_fast.bench.case import BOTH
from tinyllava_fast.errors import UserError
from tinyllava_fast.eval.report.png import INK, LINE, SOFT, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "#3155d4"
RIVALS = ("#b7791f", "#12805c", "#8a5cd1", "#c8372d", "#0e8f8f", "#667085")
MARKERS = "osD^vP"


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write ops_<op>.png for each op whose rows lie on an axis; returns the files.

    UserError if matplotlib is not installed or the folder cannot be written.
    """
    matplotlib, Figure = _matplotlib()  # noqa: N806 a class
    written = []
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        axes = curves(result, op)
        if not axes:
            continue
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(6.2 * len(axes), 8.2), dpi=110, facecolor="white")
            _page(figure, op, axes, result)
        path = folder / f"ops_{op}.png"
        _save(figure, path)
        written.append(path)
    return written


def draw_scaling(result: dict[str, Any], folder: Path) -> Path:
    """Write scaling.png of a report of bench.scaling and return its path. Errors as of draw()."""
    matplotlib, Figure = _matplotlib()  # noqa: N806 a class
    places = [row["tokens"] for row in result["rows"]]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 4.6), dpi=110, facecolor="white")
        settings = result["settings"]
        figure.text(0.05, 0.93, f"A training step against its tokens ({settings['mode']})", fontsize=15, weight="bold")
        figure.text(0.05, 0.875, _device(result["machine"]), fontsize=9.5, color=SOFT)
        left, right = figure.subplots(1, 2)
        rates = [row["samples_per_s"] for row in result["rows"]]
        sizes = [row["peak_rss_bytes"] / 2**30 for row in result["rows"]]
        for panel, title, values in ((left, "samples/s", rates), (right, "peak memory (GiB)", sizes)):
            panel.plot(places, values, color=OURS, marker="o", linewidth=2.4)
            panel.set_title(title, fontsize=11.5, loc="left", pad=8, weight="bold")
            panel.set_xlabel("tokens a step", fontsize=9.5, color=SOFT)
            panel.set_xlim(0, 1.08 * max(places))
            panel.set_ylim(0, 1.25 * max(values))
            panel.set_xticks(places, [f"{place:,.0f}" for place in places])
            _plain(panel)
        memory = result["memory"]
        ends = [0.0, 1.05 * max(places)]
        fitted = [(memory["fixed"] + memory["per_token"] * x) / 2**30 for x in ends]
        label = f"{memory['fixed'] / 2**30:.2f} GiB + {memory['per_token'] / 2**10:.0f} KiB a token"
        right.plot(ends, fitted, color=SOFT, linewidth=1, linestyle="--", label=label)
        right.legend(loc="lower right", frameon=False, fontsize=9.5)
        figure.subplots_adjust(left=0.07, right=0.97, top=0.74, bottom=0.14, wspace=0.2)
    path = folder / "scaling.png"
    _save(figure, path)
    return path


def draw_infer(result: dict[str, Any], folder: Path) -> Path:
    """Write infer.png of a report of bench.infer and return its path. Errors as of draw()."""
    matplotlib, Figure = _matplotlib()  # noqa: N806 a class
    settings, rates, waits = result["settings"], result["questions_per_s"], result["latency"]
    peers = {"ours": "tinyllava_fast", "batched": "transformers, 8 a batch", "batch1": "transformers, 1 a batch"}
    panels: list[tuple[str, dict[str, float], str]] = []
    for case, text in (("many_per_image", f"{settings['per_image']} an image"), ("one_per_image", "1 an image")):
        panels.append((f"questions/s, {text}", {peers[side]: rate for side, rate in rates[case].items()}, "{:.1f}"))
    for kind, text in (("first", "ms to the first token"), ("next", "ms a token")):
        medians = {peers[s]: 1e3 * waits[o][kind]["p50_s"] for s, o in (("ours", "ours"), ("batch1", "peer"))}
        panels.append((text, medians, "{:.1f}"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.6, 6.2), dpi=110, facecolor="white")
        weights = f", weights {settings['weights']}" if settings["weights"] else ""
        title = f"Answers of {settings['new_tokens']} tokens, {settings['dtype']}{weights}"
        figure.text(0.04, 0.945, title, fontsize=15, weight="bold")
        figure.text(0.04, 0.905, _device(result["machine"]), fontsize=9.5, color=SOFT)
        for panel, (heading, values, shown) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            names = list(values)[::-1]
            colours = [OURS if name == peers["ours"] else SOFT for name in names]
            bars = panel.barh(names, [values[name] for name in names], color=colours, height=0.62)
            panel.bar_label(bars, [shown.format(values[name]) for name in names], padding=4, fontsize=10)
            panel.set_title(heading, fontsize=11.5, loc="left", pad=8, weight="bold")
            panel.margins(x=0.14)
            _plain(panel)
            panel.grid(visible=False)
            panel.set_xticks([])
        figure.subplots_adjust(left=0.17, right=0.97, top=0.82, bottom=0.04, hspace=0.42, wspace=0.5)
    path = folder / "infer.png"
    _save(figure, path)
    return path


def _matplotlib() -> tuple[Any, Any]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot needs matplotlib; run: pip install 'tinyllava-fast[eval]'") from error
    return matplotlib, Figure


def _save(figure: Figure, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise UserError(
            f"--plot {path.parent}: cannot write there ({error.strerror}); give a folder of yours"
        ) from error


def _device(machine: dict[str, Any]) -> str:
    cpu = f"{machine['cpu']} ({machine['threads']} threads)"
    return f"{machine['gpu'] if machine['device'].startswith('cuda') else cpu}, torch {machine['torch']}"


Curves = dict[str, dict[str, list[tuple[float, dict[str, Any]]]]]


def curves(result: dict[str, Any], op: str) -> Curves:
    """{axis: {candidate: [(place, row), ...] ascending}} of the op's forward+backward rows; axes of two or more sizes.

    A candidate that was run at one size of the axis only is left out.
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


def _page(figure: Figure, op: str, axes: Curves, result: dict[str, Any]) -> None:
    names = list(dict.fromkeys(name for lines in axes.values() for name in lines))
    rivals = [name for name in names if name != "ours"]
    looks = {name: (RIVALS[i % len(RIVALS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(rivals)}
    looks["ours"] = (OURS, "o")
    figure.text(0.03, 0.965, f"{op}, forward and backward", fontsize=16, weight="bold", color=INK)
    figure.text(0.03, 0.94, f"{result['dtype']}, {_device(result['machine'])}", fontsize=9.5, color=SOFT)
    grid = figure.subplots(2, len(axes), squeeze=False)
    for column, (axis, lines) in enumerate(axes.items()):
        for line, (title, unit, value) in enumerate(
            (("time", "ms", _milliseconds), ("peak extra memory", "MB", _megabytes))
        ):
            panel = grid[line][column]
            for name in [*rivals, "ours"]:
                points = [(x, value(row, name)) for x, row in lines.get(name, ()) if value(row, name)]
                if points:
                    colour, marker = looks[name]
                    width = 2.6 if name == "ours" else 1.4
                    panel.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=width, label=name)
            _frame(panel, f"{title} ({unit})", axis, sorted({x for points in lines.values() for x, _ in points}))
    handles = {h.get_label(): h for panel in grid.flat for h in panel.get_lines()}
    figure.legend(
        handles.values(), handles.keys(), loc="lower center", ncol=min(4, len(handles)), frameon=False, fontsize=10
    )
    figure.subplots_adjust(
        left=0.5 / (6.2 * len(axes)) + 0.03, right=0.97, top=0.88, bottom=0.13, hspace=0.42, wspace=0.22
    )


def _frame(panel: Any, title: str, axis: str, places: list[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_title(title, fontsize=11.5, loc="left", pad=8, weight="bold")
    panel.set_xlabel(axis, fontsize=9.5, color=SOFT)
    panel.xaxis.set_major_locator(FixedLocator(places))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    panel.margins(y=0.12)
    _plain(panel)


def _plain(panel: Any) -> None:
    panel.tick_params(length=0, colors=SOFT, labelsize=9)
    panel.grid(axis="y", color=LINE, linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)


def _milliseconds(row: dict[str, Any], name: str) -> float:
    return 1e3 * row["medians"][name]


def _megabytes(row: dict[str, Any], name: str) -> float:
    return (row["peak_bytes"][name] or 0) / 1e6
