"""The files of an evaluation: results.json (the same for the same answers), verdicts.jsonl, official files."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

from tinyllava_fast.errors import DataError, UserError, writing
from tinyllava_fast.eval.answers import line_of, to_json
from tinyllava_fast.eval.benchmarks.base import Metric, Score
from tinyllava_fast.eval.files import is_file
from tinyllava_fast.eval.official import write_llava_answers
from tinyllava_fast.eval.plan import Plan
from tinyllava_fast.eval.types import AnswerRecord, Facts, MetricRow, PublishedRow, Results, Timings, Verdict
from tinyllava_fast.fields import Fields, read_jsonl, read_object
from tinyllava_fast.files import atomic_file
from tinyllava_fast.infer.finish import CONTEXT, FAILED, REFUSED, TOO_LONG, UNREADABLE
from tinyllava_fast.log import log

RESULTS = "results.json"
RUN = "run.json"
VERDICTS = "verdicts.jsonl"
OFFICIAL = "official"
SUMMARIZED = ("questions", "limit", "counts", "published", "config_hash", "notes")


def conclude(
    plan: Plan,
    records: Mapping[str, AnswerRecord],
    facts: Facts,
    folder: Path,
    experiment: str,
    shown: Callable[[Path], str] | None = None,
) -> Results:
    """Grade, score and write everything but run.json into folder; returns the content of results.json.

    records: question key -> {"answer", "finish", ...}, as an AnswerLog holds them. facts: what
    identifies the run, put into the results. experiment: the name that official files carry. shown: the digest of what
    a picture shows, None if no picture was looked at. Raises UserError where a file cannot be written.
    """
    bench, questions = plan.benchmark, plan.questions
    answers = {q.key: records[q.key]["answer"] for q in questions if q.key in records}
    official = folder / OFFICIAL
    with writing(official):
        official.mkdir(parents=True, exist_ok=True)
    grades = bench.grade(questions, answers, official, experiment)
    score = bench.score(questions, answers, grades)
    with writing(official):
        write_llava_answers(bench, questions, answers, official / "answers.jsonl", experiment)
        bench.outputs(questions, answers, score, plan.files, official, experiment)
    _write_verdicts(plan, records, score, folder / VERDICTS, shown)
    results = describe(plan, records, score, facts)
    write_json(folder / RESULTS, results)
    return results


def score_only(plan: Plan, records: Mapping[str, AnswerRecord], facts: Facts) -> Results:
    """Return the score of answers without writing anything; a judge is not asked."""
    answers = {key: record["answer"] for key, record in records.items()}
    return describe(plan, records, plan.benchmark.score(plan.questions, answers), facts)


def describe(plan: Plan, records: Mapping[str, AnswerRecord], score: Score, facts: Facts) -> Results:
    """Return the content of results.json, which does not depend on the time or the order of the answers."""
    answered = [(q, records[q.key]) for q in plan.questions if q.key in records]
    unreadable = [q for q, r in answered if r.get("finish") == UNREADABLE]
    ended = Counter(r.get("finish") for _, r in answered)
    counts = {
        "answered": len(answered),
        "empty": sum(not r["answer"].strip() for _, r in answered),
        "truncated": ended["length"] + ended[CONTEXT],
        "context full": ended[CONTEXT],
        "unreadable": len(unreadable),
        "too long": ended[TOO_LONG],
        "refused": ended[REFUSED],
        "failed": ended[FAILED],
        "unanswered": len(plan.questions) - len(answered),
        **score.counts,
    }
    identity = {**{k: v for k, v in facts.items() if k not in ("model", "versions")}, "limit": plan.limit}
    results: Results = {
        "benchmark": plan.name,
        "title": plan.benchmark.title,
        "questions": len(plan.questions),
        "headline": score.headline,
        "metrics": [_row(m) for m in score.metrics],
        "tables": {title: [_row(m) for m in rows] for title, rows in score.tables.items()},
        "counts": counts,
        "notes": list(score.notes),
        "unreadable_images": sorted({str(image) for q in unreadable for image in q.images}),
        "not_answered": {q.key: r["why"] for q, r in answered if r.get("why")},
        "count_differences": [str(c) for c in plan.counts if c.found != c.expected],
        "published": _published(plan, score),
        **facts,
        "limit": plan.limit,
        "config_hash": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16],
    }
    return results


def _row(metric: Metric) -> MetricRow:
    return cast(MetricRow, asdict(metric))


def summarize(output: Path, digest: str) -> dict[str, object]:
    """Write output/results.json: the headline of every benchmark in it that this model (by digest) has finished."""
    found: dict[str, dict[str, object]] = {}
    for path in sorted(output.glob(f"*/{RESULTS}")):
        try:
            results = read_object(path)
            if results.values.get("model_digest") == digest:
                found[results.text("benchmark")] = _summary(results)
        except DataError as error:
            log.warning("%s; it is left out of %s", error, output / RESULTS)
    summary: dict[str, object] = {"model_digest": digest, "benchmarks": found}
    write_json(output / RESULTS, summary)
    return summary


def _summary(results: Fields) -> dict[str, object]:
    missing = [key for key in SUMMARIZED if key not in results.values]
    if missing:
        raise DataError(f"{results.where}: no field {missing[0]!r}; evaluate this benchmark again")
    metrics = {m.text("name"): m for m in results.mappings("metrics", empty=True)}
    headline = metrics.get(results.text("headline", empty=True))
    return {
        "headline": None if headline is None else headline.values,
        "metrics": {name: m.number("value") for name, m in metrics.items()},
        **{key: results.values[key] for key in SUMMARIZED},
    }


def read_results(folder: Path) -> Results:
    """Return results.json of a folder, run.json under "run". UserError if there is none, or it is damaged.

    run.json says how long it took and on what; a damaged one may be removed, and the next tlf-eval writes it again.
    """
    path = folder / RESULTS
    if not is_file(path):
        raise UserError(f"{folder}: no {RESULTS}; run tlf-eval first")
    results = cast(Results, dict(read_object(path).values))
    run = folder / RUN
    if is_file(run):
        results["run"] = cast(Timings, dict(read_object(run).values))
    return results


def read_verdicts(folder: Path) -> list[Verdict]:
    """Return one verdict a question, in file order.

    Fields that older versions did not write may be missing, but for key, images and credit. Raises UserError if there
    is no such file, DataError, naming the line, for a field of another kind.
    """
    path = folder / VERDICTS
    if not is_file(path):
        raise UserError(f"{folder}: no {VERDICTS}; run tlf-eval first")
    return [_verdict(record) for _, record in read_jsonl(path)]


def _verdict(record: Fields) -> Verdict:
    record.text("key", empty=True)
    for name in ("category", "prompt", "truth", "answer", "finish"):
        record.text(name, None, empty=True)
    images, pictures = record.items("images", empty=True), record.items("pictures", [], empty=True)
    for name, texts in (("images", images), ("pictures", pictures)):
        if not all(isinstance(text, str) for text in texts):  # any: a path need not be UTF-8
            record.fail(name, "a list of texts", texts)
    if "credit" not in record.values:
        raise DataError(f"{record.where}: no field 'credit'; evaluate again")
    record.number("credit", None, least=0)
    return cast(Verdict, dict(record.values))


def write_json(path: Path, value: object) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it. UserError if it cannot be."""
    _replace(path, [to_json(value, 2) + "\n"])


def table(results: Iterable[Results]) -> str:
    """Return scores as plain text, for a terminal or a pipe: metrics of each benchmark, then the published rows."""
    lines = [f"{'benchmark':<12}{'metric':<18}{'score':>18}{'questions':>11}"]
    rows: list[str] = []
    for r in results:
        for number, values in enumerate(r["metrics"]):
            metric = Metric(**values)
            mark = " *" if metric.name == r["headline"] else ""
            name = r["benchmark"] if number == 0 else ""
            lines.append(f"{name:<12}{metric.name + mark:<18}{metric!s:>18}{metric.questions:>11,}")
        if not r["metrics"]:
            lines.append(f"{r['benchmark']:<12}{'(no score here)':<18}{'':>18}{r['questions']:>11,}")
        told = {k: v for k, v in r["counts"].items() if v and k != "answered"}
        if told:
            lines.append(" " * 12 + ", ".join(f"{name} {count:,}" for name, count in told.items()))
        lines += [f"{'':<12}{note}" for note in r["notes"]]
        for row in r["published"]:
            far = "" if row["difference"] is None else f"  ({row['difference']:+.{row['digits']}f})"
            rows.append(
                f"{r['benchmark']:<12}{row['metric']:<18}{row['value']:>10.{row['digits']}f}  {row['model']}{far}"
            )
    if any("*" in line for line in lines):
        lines.append("* the number that papers report; ± one standard error, clustered by image")
    return "\n".join([*lines, *(["", "published (this model minus it)"] if rows else []), *rows])


def _published(plan: Plan, score: Score) -> list[PublishedRow]:
    ours = {m.name: m for m in score.metrics}
    return [
        {
            "model": row.model,
            "value": row.value,
            "metric": row.metric,
            "difference": ours[row.metric].value - row.value if row.metric in ours else None,
            "digits": ours[row.metric].digits if row.metric in ours else 1,
        }
        for row in plan.benchmark.published
    ]


def _write_verdicts(
    plan: Plan, records: Mapping[str, AnswerRecord], score: Score, path: Path, shown: Callable[[Path], str] | None
) -> None:
    def verdicts() -> Iterator[str]:
        for q in plan.questions:
            record: AnswerRecord = records.get(q.key, {})
            verdict: Verdict = {
                "key": q.key,
                "id": q.id,
                "category": q.category,
                "prompt": q.prompt,
                "images": [str(image) for image in q.images],
                "pictures": None if shown is None else [shown(image) for image in q.images],
                "truth": q.truth,
                "answer": record.get("answer"),
                "credit": score.credit.get(q.key),
                "finish": record.get("finish"),
            }
            yield line_of(verdict)

    _replace(path, verdicts())


def _replace(path: Path, parts: Iterable[str]) -> None:
    """Write a text file so that a reader sees the old one or the new one. UserError if it cannot be written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(parts)
