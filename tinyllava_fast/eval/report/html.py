"""The report as one HTML file: styles, charts and images are inside it, so it opens offline and can be mailed."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from tinyllava_fast.data.images import load_image
from tinyllava_fast.eval.report.data import ReportData, Shot
from tinyllava_fast.eval.report.svg import loss_chart
from tinyllava_fast.page import card, document, facts_list, inline


def page(data: ReportData) -> str:
    """The whole page."""
    body = "\n".join(
        [
            _header(data),
            _tiles(data),
            '<div class="two">',
            card(
                "Training loss", "Raw values pale, their running mean bold; logarithmic scale.", loss_chart(data.curves)
            ),
            card("Accuracy by question type", _legend(data), _table(data)),
            "</div>",
            card("Questions and answers", _shots_note(data), _shots(data.shots)),
            _mistakes(data),
            card("How it was measured", "", _facts(data)),
            _config(data),
            _footer(data),
        ]
    )
    return document(f"{escape(data.title)}: {_percent(data.seen.accuracy)}", body)


def duration(seconds: float) -> str:
    """ "48 s", "12 min 03 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def size(count: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _footer(data: ReportData) -> str:
    version = escape(data.seen.results["versions"].get("tinyllava-fast", ""))
    return f"<footer>Written by tinyllava-fast {version}.</footer>"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _header(data: ReportData) -> str:
    r = data.seen.results
    note = f"{r['questions']:,} {escape(r['benchmark'])} test questions, free-running greedy generation, exact match."
    if data.note:
        note += f" {escape(data.note)}"
    return f'<header>\n<h1>{escape(data.title)}</h1>\n<p class="note">{note}</p>\n</header>'


def _tiles(data: ReportData) -> str:
    run, s = data.seen.run, data.summary
    tiles = [("lead", _percent(data.seen.accuracy), f"of {data.seen.results['questions']:,} questions right")]
    if data.blind:
        tiles.append(("", _percent(data.blind.accuracy), "blind: the same model shown blank images"))
    if s:
        tiles.append(("", duration(s["train_seconds"]), f"training, {s['samples_per_s']:,.0f} samples/s"))
    tiles.append(("", duration(run["eval_seconds"]), f"evaluation, {run['questions_per_s']:,.0f} questions/s"))
    tiles.append(("", size(data.peak_rss_bytes), "peak memory of a process"))
    inside = "\n".join(
        f'<div class="tile {kind}"><b>{value}</b><span>{text}</span></div>' for kind, value, text in tiles
    )
    return f'<div class="tiles">\n{inside}\n</div>'


def _legend(data: ReportData) -> str:
    if not data.blind:
        return "Exact match."
    return (
        '<span class="key"></span>the model &nbsp; <span class="key off"></span>blind: every image replaced by a blank '
        "one. The distance between the two is what it sees."
    )


def _table(data: ReportData) -> str:
    head = (
        "<tr><th>type</th><th></th><th>questions</th><th>accuracy</th>" + "<th>blind</th>" * bool(data.blind) + "</tr>"
    )
    rows = []
    for i, (kind, count, accuracy, blind) in enumerate(data.rows):
        bars = f'<div class="bar" style="width:{100 * accuracy:.1f}%"></div>'
        if blind is not None:
            bars += f'<div class="bar off" style="width:{100 * blind:.1f}%"></div>'
        cells = f"<td>{escape(kind)}</td><td class='bars'>{bars}</td><td>{count:,}</td><td>{_percent(accuracy)}</td>"
        cells += f"<td>{_percent(blind)}</td>" * bool(data.blind)
        rows.append(f"<tr{' class=all' * (i == len(data.rows) - 1)}>{cells}</tr>")
    return "<table>\n" + "\n".join([head, *rows]) + "\n</table>"


def _shots_note(data: ReportData) -> str:
    right = sum(s.right for s in data.shots)
    wrong = len(data.shots) - right
    return f"{len(data.shots)} questions drawn at random (seeded, not chosen): {right} right, {wrong} wrong."


def _shots(shots: Iterable[Shot]) -> str:
    return '<div class="shots">\n' + "\n".join(_shot(s) for s in shots) + "\n</div>"


def _shot(shot: Shot) -> str:
    kind, mark = ("right", "&#10003;") if shot.right else ("wrong", "&#10007;")
    truth = "" if shot.right else f'<div class="t">truth: {escape(shot.truth)}</div>'
    said = escape(shot.answer) or "(nothing)"
    return (
        f'<div class="shot {kind}"><img alt="" src="{inline(load_image(shot.image))}">'
        f'<div><div class="q">{escape(shot.question)}</div><div class="a">{mark} {said}</div>{truth}</div></div>'
    )


def _mistakes(data: ReportData) -> str:
    if not data.mistakes:
        return ""
    note = f"{len(data.mistakes)} of the {data.seen.wrong:,} wrong answers, drawn at random."
    return card("Where it fails", note, _shots(data.mistakes))


def _facts(data: ReportData) -> str:
    r, run, s = data.seen.results, data.seen.run, data.summary
    machine, engine = run["machine"], run["engine"]
    facts: list[tuple[str, str]] = [
        ("machine", f"{machine['processor']}, {machine['cores']} cores, {size(machine['memory_bytes'])} of memory"),
        ("system", machine["system"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in r["versions"].items())),
        ("model", f"{r['model']}, {run['dtype']}, SHA-256 {r['model_digest'][:16]}"),
    ]
    if "accelerator" in machine:
        facts.insert(1, ("accelerator", machine["accelerator"]))
    if s:
        rate = f"{s['samples_per_s']:,.1f} samples/s, {s['tokens_per_s']:,.0f} tokens/s"
        facts.append(("training", f"{s['steps']:,} steps in {duration(s['train_seconds'])}, {rate}"))
        facts.append(("training memory", f"{size(s['peak_rss_bytes'])} peak resident"))
    facts.append(("evaluation memory", f"{size(run['peak_rss_bytes'])} peak resident"))
    if engine["prompt_tokens"]:
        saved = 1 - engine["computed_tokens"] / engine["prompt_tokens"]
        tokens = f"{engine['computed_tokens']:,} of {engine['prompt_tokens']:,} prompt tokens computed"
        images = f"{engine['images_encoded']:,} images encoded for {engine['requests']:,} questions"
        facts.append(("work shared", f"{images}; {tokens} ({_percent(saved)} saved)"))
    return facts_list(facts)


def _config(data: ReportData) -> str:
    if not data.config:
        return ""
    return f'<details class="card"><summary>Configuration</summary>\n<pre>{escape(data.config)}</pre>\n</details>'
