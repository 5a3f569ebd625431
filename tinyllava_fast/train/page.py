"""<run>/index.html: a run at a glance while it trains, in one file that needs nothing else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tinyllava_fast.eval.report.html import duration, size
from tinyllava_fast.eval.report.svg import Line, line_chart
from tinyllava_fast.files import write_file
from tinyllava_fast.log import log
from tinyllava_fast.pace import Pace
from tinyllava_fast.page import card, document, inline
from tinyllava_fast.train.answers import SampleRow, picture
from tinyllava_fast.train.history import History, Series
from tinyllava_fast.train.metrics import Entry
from tinyllava_fast.train.pulse import Pulse
from tinyllava_fast.train.standing import numbers_of

FILE = "index.html"
EVERY_S = 30.0
_SIDE = 96  # of a sample's picture
_SAID = {"finished": "finished", "stopped": "stopped", "diverged": "diverged", "failed": "ended by an error"}


class Page:
    """Keeps the page of a run folder up to date, at most every half a minute and at its end.

    config: the run's YAML. history: what metrics.jsonl holds so far.
    """

    def __init__(self, run: Path, config: str) -> None:
        self._path, self._config = run / FILE, config
        self.history = History.read(run / "metrics.jsonl")
        self._title = run.resolve().name
        self._samples: Sequence[SampleRow] = []
        self._stage = ""  # of the samples
        self._pictures: dict[str, str] = {}  # as HTML
        self._pace = Pace(every_s=EVERY_S)

    def add(self, entry: Entry, pulse: Pulse) -> None:
        """Add a line of metrics.jsonl, and write the page if it is time."""
        self.history.add(entry)
        if self._pace.due():
            self.write(pulse)

    def show(self, stage: str, rows: Sequence[SampleRow]) -> None:
        """Show these samples from the next writing on."""
        self._stage, self._samples = stage, rows

    def write(self, pulse: Pulse) -> None:
        """Write the page now."""
        try:
            write_file(self._path, self.text(pulse).encode("utf-8", "replace"), durable=False)
        except OSError as error:  # no reason to lose a step
            log.warning("%s: cannot be written: %s", self._path, error.strerror or error)

    def text(self, pulse: Pulse) -> str:
        """Return the page."""
        return render(self._title, pulse, self.history, self._table(), self._config)

    def _table(self) -> str:
        if not self._samples:
            return ""
        note = f"Held-out questions of stage {escape(self._stage)}, answered greedily at its last validation."
        head = "<tr><th></th><th>question</th><th>answer now</th><th>answer before</th><th>truth</th></tr>"
        rows = "\n".join(map(self._row, self._samples))
        return card("Samples", note, f'<table class="answers">\n{head}\n{rows}\n</table>')

    def _row(self, row: SampleRow) -> str:
        right = " class='right'" if row["now"].strip() == row["truth"].strip() else ""
        texts = f"<td{right}>{escape(row['now'])}</td><td>{escape(row['before'])}</td><td>{escape(row['truth'])}</td>"
        return f"<tr><td>{self._picture(row)}</td><td>{escape(row['question'])}</td>{texts}</tr>"

    def _picture(self, row: SampleRow) -> str:
        key = str(row["image"])
        if key not in self._pictures:
            image = picture(row, _SIDE)
            self._pictures[key] = "" if image is None else f'<img alt="" src="{inline(image)}">'
        return self._pictures[key]


def render(title: str, pulse: Pulse, history: History, samples: str, config: str) -> str:
    """Return the page of a run. samples: HTML. config: YAML."""
    charts = [
        _chart("Training loss", "Mean over the supervised tokens, logarithmic scale.", history, "loss", log=True),
        _chart("Validation loss", "Of what is held out, logarithmic scale.", history, "validation loss", log=True),
        _chart("Benchmarks", "Headline of each, at every validation.", history, "score"),
        _chart("Learning rates", "By component.", history, "lr"),
        _chart("Gradient norm", "Before clipping, logarithmic scale.", history, "grad_norm", log=True),
        _chart(
            "Gradient noise scale",
            "Packs of a step, logarithmic scale.",
            history,
            "noise",
            log=True,
        ),
        _chart("Samples a second", "Over all processes.", history, "samples_per_s"),
        _chart("Idle processes", "Percent of their time that they wait for the slowest.", history, "idle", scale=100),
        _chart("Memory", "GiB in use by the first process.", history, "memory_bytes", scale=2**-30),
    ]
    why = f"<pre class='why'>{escape(pulse['why'])}</pre>" if pulse["why"] else ""
    live = pulse["state"] == "running"
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(pulse["updated"]))
    body = "\n".join(
        [
            f"<header>\n<h1>{escape(title)}</h1>\n<p class='note'>As of {written}"
            + (f", written anew every {EVERY_S:.0f} s." if live else ".")
            + f"</p>\n{why}</header>",
            _tiles(pulse, history),
            f'<div class="two">\n{"".join(chart for chart in charts if chart)}\n</div>',
            samples,
            f'<details class="card"><summary>Configuration</summary>\n<pre>{escape(config)}</pre>\n</details>',
        ]
    )
    return document(escape(title), body, refresh_s=EVERY_S if live else None)


def _tiles(pulse: Pulse, history: History) -> str:
    """Return the numbers at the top."""
    state = pulse["state"]
    place = f"{pulse['stage_step']:,} / {pulse['stage_steps']:,}" if pulse["stage"] else "starting"
    lead = (pulse["doing"] or "running") if state == "running" else _SAID[state]
    tiles = [("bad" if state in ("diverged", "failed") else "lead", lead, f"stage {pulse['stage']}, step {place}")]
    if state == "running":
        tiles.append(("", duration(pulse["eta_s"]), "to the end of the run, about"))
    last = history.last
    if last is not None:
        loss = "no number" if last["loss"] is None else f"{last['loss']:.4g}"
        tiles.append(("", loss, f"training loss at step {last['step']:,}"))
        if (best := history.best.get(last["stage"])) is not None:
            tiles.append(("", f"step {best[0]:,}", f"best so far: {numbers_of(best[1])}"))
        tiles.append(("", f"{last.get('samples_per_s', 0.0):,.1f}", "samples a second"))
        tiles.append(("", size(last.get("memory_bytes", 0)), "memory in use"))
    inside = "\n".join(
        f'<div class="tile {kind}"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
        for kind, value, text in tiles[:5]
    )
    return f'<div class="tiles run">\n{inside}\n</div>'


def _chart(title: str, note: str, history: History, kind: str, *, log: bool = False, scale: float = 1.0) -> str:
    """Return a card with the series of a kind; "" if there are none."""
    series = history.of(kind)
    stages = list(history.ends.items())
    named = len(series) > 1 or "" not in series
    lines = [
        _line(one, number, (name or "all") if named else "", scale) for number, (name, one) in enumerate(series.items())
    ]
    drawn = line_chart(lines, title, stages if len(stages) > 1 else [], log=log)
    return card(title, note, drawn) if drawn else ""


def _line(series: Series, number: int, name: str, scale: float) -> Line:
    return Line(series.steps, [value * scale for value in series.values], number % 4, "line", name)
