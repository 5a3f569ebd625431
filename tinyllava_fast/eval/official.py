"""Answer files in the format of LLaVA and TinyLLaVA Factory: written for their tools, read for --score-only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import Answers, Benchmark, Question
from tinyllava_fast.fields import Fields, read_jsonl, shown


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
            record: dict[str, Any] = {
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
    answered twice, or a line that is neither format.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such answers file")
    by_id: dict[str, list[Question]] = {}
    for q in questions:
        by_id.setdefault(str(q.id), []).append(q)
    keys = {q.key for q in questions}
    lines: dict[str, int] = {}
    answers: dict[str, str] = {}
    for number, record in read_jsonl(path):
        where = record.where
        if "run" in record or "session" in record:
            continue
        if "key" in record:
            key, text = record.text("key"), record.text("answer", empty=True)
        else:
            same_id = by_id.get(str(record.identifier("question_id")), [])
            text = record.text("text", empty=True)
            key = _key(benchmark, same_id, record, lines)
        if key not in keys:
            raise DataError(f"{where}: question {shown(key)} is not one of {benchmark.name}'s {len(questions):,}")
        if key in lines:
            raise DataError(f"{where}: question {key!r} is answered in line {lines[key]} already; remove one of them")
        lines[key], answers[key] = number, text
    if not answers:
        raise DataError(f"{path}: it holds no answer; one JSON object a line is expected, with question_id and text")
    return answers


def _key(benchmark: Benchmark, same_id: Sequence[Question], record: Fields, taken: dict[str, int]) -> str:
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
