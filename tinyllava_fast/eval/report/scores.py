"""The scores of an evaluation as one HTML file: published rows, categories, confusions, samples, answer times.

Everything is inside it and nothing is a script: the filters of the samples are style sheets.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tinyllava_fast.data.images import load_image
from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import Metric
from tinyllava_fast.eval.report.confusion import section
from tinyllava_fast.eval.report.html import size
from tinyllava_fast.eval.report.looks import section as looks
from tinyllava_fast.eval.report.svg import histogram
from tinyllava_fast.eval.results import read_results, read_verdicts
from tinyllava_fast.eval.types import MetricRow, PublishedRow, Results, Verdict
from tinyllava_fast.page import card, document, facts_list, inline

SAMPLES = 48  # of a benchmark, half of them wrong where there are as many
ROWS = 30  # of a breakdown


def page(folders: Sequence[Path], *, seed: int = 0) -> str:
    """The whole page. folders: results of one benchmark each. The samples are a seeded random draw."""
    results = [read_results(folder) for folder in folders]
    model = escape(model_name(results[0].get("model", "answers")))
    body = "\n".join(
        [
            f"<header>\n<h1>{model}</h1>\n<p class='note'>{_headnote(results[0])}</p>\n</header>",
            card(
                "Scores",
                "± one standard error, clustered by image. Bold: the number that papers report.",
                _all(results),
            ),
            *(_benchmark(r, folder, seed) for r, folder in zip(results, folders, strict=True)),
            card("How it was measured", "", facts_list(_facts(results[0]))),
        ]
    )
    return document(f"{model}: scores", body)


def model_name(path: str) -> str:
    """Return a model's name: the run of a ``final`` folder, the run and the stage of another folder of it.

    >>> model_name("/runs/digits/final"), model_name("/runs/digits/pretrain"), model_name("answers")
    ('digits', 'digits/pretrain', 'answers')
    """
    folder = Path(path)
    if folder.name == "final":
        return folder.resolve().parent.name or "final"
    return "/".join(folder.parts[-2:]).strip("/")


def _headnote(results: Results) -> str:
    blind = "Every image was replaced by a blank one. " if results.get("blind") else ""
    return f"{blind}Greedy generation, the official prompts and scores."


def _all(results: Sequence[Results]) -> str:
    rows = ["<tr><th>benchmark</th><th>metric</th><th></th><th>score</th><th>questions</th><th>published</th></tr>"]
    for r in results:
        for number, values in enumerate(r["metrics"]):
            metric = Metric(**values)
            head = metric.name == r["headline"]
            published = "<br>".join(_published(row) for row in r["published"] if row["metric"] == metric.name)
            cells = [
                f"<td>{escape(r['title']) if number == 0 else ''}</td><td>{escape(metric.name)}</td>",
                f"<td class='bars'>{_bar(metric)}</td><td>{escape(str(metric))}</td><td>{metric.questions:,}</td>",
                f"<td class='note'>{published}</td>",
            ]
            rows.append(f"<tr{' class=all' * head}>{''.join(cells)}</tr>")
        if not r["metrics"]:
            said = escape(" ".join(r["notes"]))
            rows.append(f"<tr><td>{escape(r['title'])}</td><td class='note' colspan='5'>{said}</td></tr>")
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def _published(row: PublishedRow) -> str:
    far = "" if row["difference"] is None else f" ({row['difference']:+.{row['digits']}f})"
    return f"{escape(row['model'])} {row['value']:g}{far}"


def _bar(metric: Metric) -> str:
    if not metric.scale:
        return ""
    return f'<div class="bar" style="width:{min(100.0, max(0.0, 100 * metric.value / metric.scale)):.1f}%"></div>'


def _benchmark(results: Results, folder: Path, seed: int) -> str:
    verdicts = read_verdicts(folder)
    counts = {name: count for name, count in results["counts"].items() if count}
    said = [f"{name}: {count:,}" for name, count in counts.items()]
    note = escape(" · ".join([*said, *results["notes"], *results["count_differences"]]))
    parts = [_breakdown(title, rows) for title, rows in results["tables"].items()]
    parts += [looks(folder), section(verdicts), _samples(results["benchmark"], verdicts, seed)]
    if times := results["run"].get("latency") if "run" in results else None:
        parts.append(
            "<h3>Answer times</h3><p class='note'>Seconds from entering the engine's queue to the end of the answer, "
            f"{times['count']:,} answers.</p>{histogram(times)}"
        )
    return card(escape(results["title"]), note, "\n".join(parts))


def _breakdown(title: str, rows: Sequence[MetricRow]) -> str:
    lines = []
    for values in rows[:ROWS]:
        metric = Metric(**values)
        lines.append(
            f"<tr><td>{escape(metric.name)}</td><td class='bars'>{_bar(metric)}</td><td>{escape(str(metric))}</td>"
            f"<td>{metric.questions:,}</td></tr>"
        )
    more = f"<p class='note'>{len(rows) - ROWS} more rows are in results.json.</p>" if len(rows) > ROWS else ""
    return f"<h3>By {escape(title)}</h3><table>\n" + "\n".join(lines) + f"\n</table>{more}"


def _samples(name: str, verdicts: list[Verdict], seed: int) -> str:
    drawn = _draw(verdicts, seed)
    kinds = [_kind(v) for v in drawn]
    radios = "".join(
        f'<input type="radio" name="{name}" id="{name}-{kind}" class="show-{kind}"{" checked" * (kind == "all")}>'
        f'<label for="{name}-{kind}">{kind} {len(kinds) if kind == "all" else kinds.count(kind)}</label>'
        for kind in ("all", "right", "partly", "wrong", "unscored")
        if kind == "all" or kind in kinds
    )
    shown = "\n".join(_sample(v, kind) for v, kind in zip(drawn, kinds, strict=True))
    return (
        f"<h3>Samples</h3><p class='note'>{len(drawn)} of {len(verdicts):,} questions, drawn at random (seeded, not "
        f'chosen), half of them wrong ones where there are enough.</p><div class="filter">{radios}'
        f'<div class="shots wide">\n{shown}\n</div></div>'
    )


def _draw(verdicts: list[Verdict], seed: int) -> list[Verdict]:
    order = list(verdicts)
    random.Random(seed).shuffle(order)
    wrong = [v for v in order if _kind(v) == "wrong"][: SAMPLES // 2]
    taken = {v["key"] for v in wrong}
    rest = [v for v in order if v["key"] not in taken and _kind(v) != "wrong"][: SAMPLES - len(wrong)]
    keys = taken | {v["key"] for v in rest}
    return [v for v in order if v["key"] in keys]


def _kind(verdict: Verdict) -> str:
    credit = verdict["credit"]
    if credit is None:
        return "unscored"
    return "right" if credit == 1 else "wrong" if credit == 0 else "partly"


def _sample(verdict: Verdict, kind: str) -> str:
    picture = "".join(f'<img alt="" src="{source}">' for image in verdict["images"][:1] if (source := _picture(image)))
    truth = f'<div class="t">truth: {escape(verdict["truth"])}</div>' if verdict["truth"] else ""
    return (
        f'<div class="shot {kind}">{picture}<div><div class="q">{escape(verdict["prompt"])}</div>'
        f'<div class="a">{escape(verdict["answer"] or "(nothing)")}</div>{truth}</div></div>'
    )


def _picture(image: str) -> str:
    try:
        return inline(load_image(image), "JPEG")
    except DataError:
        return ""


def _facts(results: Results) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    if machine := results["run"].get("machine") if "run" in results else None:
        memory = size(machine["memory_bytes"])
        facts.append(("machine", f"{machine['processor']}, {machine['cores']} cores, {memory} of memory"))
        facts.append(("system", machine["system"]))
    if "versions" in results:
        facts.append(("versions", ", ".join(f"{k} {v}" for k, v in results["versions"].items())))
    if "endpoint" in results:
        facts.append(("model", f"{results['model']} at {results['endpoint']}"))
    elif "model_digest" in results:
        facts.append(("model", f"{results['model']}, SHA-256 {results['model_digest'][:16]}"))
    return facts
