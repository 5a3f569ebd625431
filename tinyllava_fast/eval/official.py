"""Answer files in the format of LLaVA and TinyLLaVA Factory: written for their tools, read for --score-only."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.answers import asked
from tinyllava_fast.eval.benchmarks.base import Answers, Benchmark, Question
from tinyllava_fast.eval.files import is_file
from tinyllava_fast.eval.pictures import Pictures
from tinyllava_fast.fields import Fields, read_jsonl, shown


def experiment_name(name: str) -> str:
    """A name for official files and their fields: bytes of a path that are not UTF-8 are replaced."""
    return os.fsencode(name).decode("utf-8", "replace")


def write_llava_answers(
    benchmark: Benchmark, questions: Iterable[Question], answers: Answers, path: Path, experiment: str
) -> None:
    """One line a question, in file order: question_id, prompt, text, answer_id, model_id, metadata.

    answer_id, random in the reference, is a digest, so that the same answers give the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for q in questions:
            if q.key not in answers:
                continue
            digest = hashlib.sha256(f"{experiment}\0{q.key}\0{answers[q.key]}".encode()).hexdigest()[:22]
            record: dict[str, object] = {
                "question_id": q.id,
                "prompt": benchmark.recorded_prompt(q),
                "text": answers[q.key],
                "answer_id": digest,
                "model_id": experiment,
                "metadata": {},
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_answers(path: Path, benchmark: Benchmark, questions: Sequence[Question]) -> dict[str, str]:
    """Question key -> answer out of an answers file of this toolkit, LLaVA or TinyLLaVA Factory.

    questions: all of the benchmark. Raises DataError, naming the line, for an id that is not among them, one that is
    answered twice, or a line that is neither format. A file of this toolkit may hold several answers to a question
    whose prompt or pictures changed: the last to what is asked now counts. Raises where there is none, and for a file
    that holds answers of several runs.
    """
    if not is_file(path):
        raise DataError(f"{path}: there is no such answers file")
    by_id: dict[str, list[Question]] = {}
    for q in questions:
        by_id.setdefault(str(q.id), []).append(q)
    known = {q.key: q for q in questions}
    run: Fields | None = None  # that the lines which follow are of
    given: dict[str, list[_Given]] = {}
    for number, record in read_jsonl(path):
        if "run" in record:
            run = record.mapping("run")
        if "run" in record or "session" in record:
            continue
        if "key" in record:
            key, text = record.text("key"), record.text("answer", empty=True)
        else:
            same_id = by_id.get(str(record.identifier("question_id")), [])
            text = record.text("text", empty=True)
            key = _key(benchmark, same_id, record, given)
        if key not in known:
            raise DataError(
                f"{record.where}: question {shown(key)} is not one of {benchmark.name}'s {len(questions):,}"
            )
        before = given.setdefault(key, [])
        if before and run is None:
            raise DataError(
                f"{record.where}: question {key!r} is answered in line {before[0].line} already; remove one of them"
            )
        before.append(_Given(number, text, record.text("asked", "") if "key" in record else "", run))
    if not given:
        raise DataError(f"{path}: it holds no answer; one JSON object a line is expected, with question_id and text")
    return _current(path, known, given)


class _Given(NamedTuple):
    """An answer of a file. asked: to what, as eval.answers writes it. run: what gave it, None in a foreign file."""

    line: int
    text: str
    asked: str
    run: Fields | None


def _current(path: Path, known: Mapping[str, Question], given: Mapping[str, Sequence[_Given]]) -> dict[str, str]:
    """Question key -> the answer that counts."""
    runs = [g.run.values for every in given.values() for g in every if g.run is not None]
    if other := next((run for run in runs if run != runs[0]), None):
        differ = sorted(name for name in {**runs[0], **other} if runs[0].get(name) != other.get(name))
        raise DataError(
            f"{path}: it holds answers of several runs, which differ in {', '.join(differ)}; score "
            f"{path.parent / 'official' / 'answers.jsonl'}, which holds those of the last evaluation"
        )
    several = {key: every for key, every in given.items() if len({g.asked for g in every}) > 1}
    blind = bool(runs and runs[0].get("blind"))
    pictures = Pictures(path.parent, keep=False)
    if not blind:
        pictures.look(image for key in several for image in known[key].images)
    answers = {key: every[-1].text for key, every in given.items()}
    for key, every in several.items():
        q = known[key]
        now = asked(q, ["blank" if blind else pictures.digest(image) for image in q.images])
        matching = [g.text for g in every if g.asked == now]
        if not matching:
            raise DataError(
                f"{path}: question {key!r} is answered in lines {', '.join(str(g.line) for g in every)}, each time to "
                "another prompt or other pictures than now; run tlf-eval on its model again, or remove all but one"
            )
        answers[key] = matching[-1]
    return answers


def _key(benchmark: Benchmark, same_id: Sequence[Question], record: Fields, taken: Container[str]) -> str:
    """The key of the question that a record of LLaVA's format answers; the prompt tells questions of one id apart."""
    id = shown(record.identifier("question_id"))
    if not same_id:
        raise DataError(f"{record.where}: question_id {id} is not one of {benchmark.name}'s")
    if len(same_id) == 1:
        return same_id[0].key
    prompt = record.text("prompt")
    asked = [q for q in same_id if benchmark.is_asked_by(q, prompt)]
    if not asked:
        raise DataError(f"{record.where}: no question {id} of {benchmark.name} has this prompt")
    return next((q for q in asked if q.key not in taken), asked[0]).key
