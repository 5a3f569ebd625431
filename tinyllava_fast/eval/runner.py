"""Runs a benchmark on a model: questions to the engine, answers to JSONL, the official score to results.json."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from tinyllava_fast.errors import UserError
from tinyllava_fast.eval.answers import AnswerLog
from tinyllava_fast.eval.benchmarks.base import BENCHMARKS, Question
from tinyllava_fast.eval.machine import machine, model_digest, versions
from tinyllava_fast.eval.progress import progress
from tinyllava_fast.hardware import peak_rss_bytes
from tinyllava_fast.infer.assistant import Assistant
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.log import log

ANSWERS = "answers.jsonl"
RESULTS = "results.json"


def evaluate(
    model: str | Path,
    benchmark: str,
    data_dir: str | Path,
    output_dir: str | Path | None = None,
    *,
    blind: bool = False,
    limit: int | None = None,
    dtype: str | None = None,
    device: str = "auto",
    weights: str | None = None,
    batch_tokens: int = 16384,
    threads: int = 2,
) -> dict[str, Any]:
    """Evaluate a model folder and return what is written to ``output_dir``/results.json.

    blind: every image is replaced by a blank one of the mean colour; what the model still answers right it
    answers from the text alone. limit: only the first questions. output_dir: None puts it beside the model folder.
    A run that was killed goes on with the questions it has not answered.
    Raises UserError for an unknown benchmark, missing files, or a folder that is not a model.
    """
    bench = BENCHMARKS.get(benchmark, "--benchmark")()
    questions = bench.questions(Path(data_dir))[:limit]
    if not questions:
        raise UserError(f"{data_dir}: no question to ask; check --limit and the data folder")
    output = Path(output_dir) if output_dir is not None else default_output(model, benchmark, blind)
    assistant = Assistant.from_pretrained(
        model, dtype=dtype, device=device, weights=weights, batch_tokens=batch_tokens, threads=threads
    )
    facts = {
        "benchmark": benchmark,
        "blind": blind,
        "model_digest": model_digest(model),
        "dtype": str(assistant.engine.lmm.dtype).removeprefix("torch."),
        "max_new_tokens": bench.max_new_tokens,
        **({"weights": weights} if weights else {}),
    }
    answers = AnswerLog(output / ANSWERS, facts)
    done = _finished(output / RESULTS, {**facts, "limit": limit}, answers)
    if done is not None:
        log.info("%s: finished already", output / RESULTS)
        return done
    _ask(assistant, questions, answers, bench.max_new_tokens, blind)
    score = bench.score(questions, answers.texts)
    correct = score.pop("correct")
    results = {
        **score,
        **facts,
        "model": str(model),
        "limit": limit,
        "answered_now": assistant.engine.counters.requests,
        "eval_seconds": round(answers.seconds, 3),
        "questions_per_s": round(len(answers.texts) / answers.seconds, 3) if answers.seconds else 0.0,
        "peak_rss_bytes": peak_rss_bytes(),
        "engine": asdict(assistant.engine.counters),
        "wrong": [i for i, right in correct.items() if not right],
        "machine": machine(),
        "versions": versions(),
    }
    write_json(output / RESULTS, results)
    log.info("%s%s: %.2f %% of %d", benchmark, " (blind)" * blind, 100 * score["accuracy"], len(questions))
    return results


def _finished(path: Path, facts: dict[str, Any], answers: AnswerLog) -> dict[str, Any] | None:
    """The results of the same evaluation if it has been finished before: their timings are those of the real run."""
    if not path.exists() or not answers.texts:
        return None
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    same = all(results.get(key) == value for key, value in facts.items())
    return results if same and len(answers.texts) >= results["questions"] else None


def default_output(model: str | Path, benchmark: str, blind: bool) -> Path:
    """Where results go by default: runs/demo/final -> runs/demo/eval/easy_vqa[-blind]."""
    return Path(model).resolve().parent / "eval" / (benchmark + "-blind" * blind)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def blank_image(processor: Any, size: int) -> Image.Image:
    """An image of the processor's mean colour: all zeros once normalised."""
    mean = getattr(processor, "image_mean", None) or (0.5, 0.5, 0.5)
    return Image.new("RGB", (size, size), tuple(int(255 * m) for m in mean))


def _ask(
    assistant: Assistant, questions: Sequence[Question], answers: AnswerLog, max_new_tokens: int, blind: bool
) -> None:
    """Put the unanswered questions to the engine, those about one image together."""
    engine = assistant.engine
    blank = blank_image(engine.processor, engine.lmm.image_size) if blind else None
    todo = [q for q in questions if q.id not in answers.texts]
    if not todo:
        return
    todo.sort(key=lambda q: str(q.image))
    sampling = Sampling(max_new_tokens=max_new_tokens)
    requests = (
        Request.ask(q.text, blank if blank is not None and q.image is not None else q.image, sampling=sampling, id=q.id)
        for q in todo
    )
    with answers:
        shown = progress(engine.run(requests), total=len(questions), done=len(questions) - len(todo))
        for answer in shown:
            answers.add(answer)
