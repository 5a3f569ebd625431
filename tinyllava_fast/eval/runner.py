"""Runs benchmarks on a model: questions to the engine, answers to JSONL, the official scores to results.json."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from tinyllava_fast.data.images import load_image
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.eval.answers import CANNED, UNREADABLE, AnswerLog
from tinyllava_fast.eval.benchmarks.base import Question
from tinyllava_fast.eval.machine import machine, model_digest, versions
from tinyllava_fast.eval.options import build
from tinyllava_fast.eval.options import describe as settings
from tinyllava_fast.eval.plan import Plan, make_plans
from tinyllava_fast.eval.progress import progress
from tinyllava_fast.eval.ranks import Ranks
from tinyllava_fast.eval.results import RUN, conclude, read_results, summarise, write_json
from tinyllava_fast.eval.statistics import histogram
from tinyllava_fast.hardware import peak_rss_bytes
from tinyllava_fast.infer.assistant import Assistant
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.log import log


def evaluate(
    model: str | Path,
    benchmarks: Sequence[str],
    data: str | Path,
    output: str | Path | None = None,
    *,
    options: Sequence[str] = (),
    blind: bool = False,
    limit: int | None = None,
    missing_images: str = "error",
    dtype: str | None = None,
    device: str = "auto",
    weights: str | None = None,
    batch_tokens: int = 16384,
    threads: int = 2,
) -> dict[str, dict[str, Any]]:
    """Evaluate a model folder; benchmark name -> the content of output/<name>/results.json, run.json under "run".

    data: the folder of all benchmarks, or of the only one. options: "textvqa.ocr=false", ... blind: every image is
    replaced by a blank one of the mean colour; what is still answered right comes from the text alone. limit: only
    the first questions of each. missing_images: "error", or "empty" to score their questions as empty answers. output:
    None puts it beside the model folder. A killed run goes on with the questions it has not answered. Under torchrun
    every rank answers its share of the images; the others return {} once rank 0 can score.
    Raises UserError for an unknown benchmark, missing files, a prompt that does not fit, or a folder that is no model.
    """
    plans = make_plans(build(benchmarks, options), data, limit=limit, missing_images=missing_images)
    ranks = Ranks.of_torchrun()
    folder = Path(output) if output is not None else default_output(model, blind)
    digest = model_digest(model)
    lazy = _Model(
        model, dtype=dtype, device=ranks.device(device), weights=weights, batch_tokens=batch_tokens, threads=threads
    )
    facts = {"model": str(model), "model_digest": digest, "dtype": dtype or "as saved", "blind": blind}
    if weights:
        facts["weights"] = weights
    results: dict[str, dict[str, Any]] = {}
    if ranks.world == 1:
        for plan in plans:
            results[plan.name] = _Evaluation(plan, lazy, facts, folder, ranks).run()
    else:
        every = [_Evaluation(plan, lazy, facts, folder, ranks) for plan in plans]
        for one in every:
            one.answer()
        ranks.wait_for_all()
        if ranks.rank == 0:
            results = {one.plan.name: one.merge().conclude() for one in every}
    if ranks.rank == 0:
        summarise(folder, digest)
    return results


def default_output(model: str | Path, blind: bool) -> Path:
    """Where results go by default: runs/demo/final -> runs/demo/eval, or runs/demo/eval-blind."""
    return Path(model).resolve().parent / ("eval" + "-blind" * blind)


def blank_image(processor: Any, size: int) -> Image.Image:
    """An image of the processor's mean colour: all zeros once normalised."""
    mean = getattr(processor, "image_mean", None) or (0.5, 0.5, 0.5)
    return Image.new("RGB", (size, size), tuple(int(255 * m) for m in mean))


class _Model:
    """A model folder that is opened when it is first needed: a finished evaluation is scored without it."""

    def __init__(self, path: str | Path, **options: Any) -> None:
        self.path = path
        self.loaded = False
        self._options = options

    @cached_property
    def assistant(self) -> Assistant:
        """The opened model."""
        self.loaded = True
        return Assistant.from_pretrained(self.path, **self._options)

    @cached_property
    def blank(self) -> Image.Image:
        """What --blind shows in place of every image."""
        engine = self.assistant.engine
        return blank_image(engine.processor, engine.lmm.image_size)


class _Evaluation:
    """One benchmark on one model."""

    def __init__(self, plan: Plan, model: _Model, facts: dict[str, Any], output: Path, ranks: Ranks) -> None:
        self.plan = plan
        self.model = model
        self.ranks = ranks
        self.folder = output / plan.name
        self.facts = {
            **facts,
            "options": settings(plan.benchmark),
            "max_new_tokens": plan.benchmark.max_new_tokens,
        }
        # Where the model lies is no part of what it is; options that matter to an answer are seen in its prompt, and
        # the others (a judge, a seed of the score) must not cost the answers.
        run = {key: value for key, value in self.facts.items() if key not in ("model", "options")}
        self.answers = AnswerLog(self.folder, {"benchmark": plan.name, **run}, plan.everything, ranks.rank)
        self._known = len(self.answers.records)

    def run(self) -> dict[str, Any]:
        """Answer what is open, then score."""
        self.answer()
        return self.conclude()

    def answer(self) -> None:
        """Answer this rank's open questions."""
        mine = [q for q in self.ranks.share(self.plan.questions) if q.key not in self.answers.records]
        if not mine:
            return
        missing = set(self.plan.missing_images)
        pairs: dict[tuple[Any, str], list[Question]] = {}
        with self.answers:
            for q in mine:
                if q.canned is not None:
                    self.answers.add(q.key, q.canned, finish=CANNED)
                elif missing.intersection(q.images):
                    self.answers.add(q.key, "", finish=UNREADABLE)
            answered = {self._pair(q): q for q in self.plan.everything if q.key in self.answers.records}
            for q in mine:
                if q.key in self.answers.records:
                    continue
                if twin := answered.get(self._pair(q)):
                    self._copy(twin, q)
                else:
                    pairs.setdefault(self._pair(q), []).append(q)
            self._ask(pairs)

    def merge(self) -> _Evaluation:
        """Read the answers of the other ranks, which have all finished."""
        self.answers = AnswerLog(self.folder, self.answers.run, self.plan.everything, self.ranks.rank)
        return self

    def conclude(self) -> dict[str, Any]:
        """Score the answers of all ranks and write the results."""
        open_ = [q for q in self.plan.questions if q.key not in self.answers.records]
        if open_:
            raise UserError(f"{self.folder}: {len(open_):,} questions are not answered yet; run the same command again")
        facts = {**self.facts, "versions": versions()}
        results = conclude(self.plan, self.answers.records, facts, self.folder, _experiment(self.facts))
        if len(self.answers.records) > self._known or not (self.folder / RUN).exists():
            write_json(self.folder / RUN, self._timings())
        for image in results["unreadable_images"][:5]:
            log.warning("%s: unreadable image, scored as an empty answer: %s", self.plan.name, image)
        headline = next((m for m in results["metrics"] if m["name"] == results["headline"]), None)
        shown = (
            "answers written" if headline is None else f"{headline['name']} {headline['value']:.{headline['digits']}f}"
        )
        log.info(
            "%s%s: %s, %d questions", self.plan.name, " (blind)" * self.facts["blind"], shown, results["questions"]
        )
        return read_results(self.folder)

    def _ask(self, pairs: dict[tuple[Any, str], list[Question]]) -> None:
        """Put one question of each (images, prompt) pair to the engine; unreadable images are set aside, not fatal."""
        todo = dict(pairs)
        total = len(self.ranks.share(self.plan.questions))
        while todo:
            try:
                for key, finish, text, tokens, latency in self._engine_answers(todo, total):
                    first, *rest = todo.pop(key)
                    self.answers.add(first.key, text, finish=finish, tokens=tokens, latency=latency)
                    for twin in rest:
                        self._copy(first, twin)
            except DataError:
                bad = _unreadable(image for _, (q, *_) in todo.items() for image in q.images)
                broken = [key for key, (q, *_) in todo.items() if bad.intersection(q.images)]
                if not broken:
                    raise
                for key in broken:
                    for q in todo.pop(key):
                        self.answers.add(q.key, "", finish=UNREADABLE)
            except UserError as error:
                raise UserError(f"{self.plan.name}: {error}") from error

    def _engine_answers(
        self, todo: dict[tuple[Any, str], list[Question]], total: int
    ) -> Iterator[tuple[tuple[Any, str], str, str, int, float]]:
        engine = self.model.assistant.engine
        sampling = Sampling(max_new_tokens=self.plan.benchmark.max_new_tokens)
        entered: dict[str, tuple[tuple[Any, str], float]] = {}

        def requests() -> Iterator[Request]:
            for key, (q, *_) in sorted(todo.items(), key=lambda item: (item[1][0].cluster, item[1][0].key)):
                entered[q.key] = key, time.monotonic()
                yield Request.ask(q.prompt, self._shown(q), sampling=sampling, id=q.key)

        for answer in progress(engine.run(requests()), total=total, done=total - len(todo)):
            key, since = entered.pop(answer.id)
            yield key, answer.finish, answer.text, len(answer.tokens), time.monotonic() - since

    def _shown(self, q: Question) -> Any:
        images: list[Any] = [self.model.blank for _ in q.images] if self.facts["blind"] else list(q.images)
        return (images[0] if len(images) == 1 else images) if images else None

    def _pair(self, q: Question) -> tuple[Any, str]:
        """What makes two questions the same one to the model."""
        return (len(q.images) if self.facts["blind"] else q.images, q.prompt)

    def _copy(self, source: Question, twin: Question) -> None:
        record = self.answers.records[source.key]
        self.answers.add(twin.key, record["answer"], finish=record["finish"], tokens=record["tokens"])

    def _timings(self) -> dict[str, Any]:
        """How long it took and on what. Counters are of this process, over all benchmarks so far."""
        seconds, records = self.answers.seconds, self.answers.records
        engine = self.model.assistant.engine if self.model.loaded else None
        return {
            "answered_now": len(records) - self._known,
            "eval_seconds": round(seconds, 3),
            "questions_per_s": round(len(records) / seconds, 3) if seconds else 0.0,
            "latency": histogram([r["latency"] for r in records.values() if r["latency"] is not None]),
            "peak_rss_bytes": peak_rss_bytes(),
            "engine": asdict(engine.counters) if engine else {},
            "dtype": str(engine.lmm.dtype).removeprefix("torch.") if engine else "",
            "processes": self.ranks.world,
            "machine": machine(),
        }


def _experiment(facts: dict[str, Any]) -> str:
    """The name that official files carry: the model folder's, with its run's where it is called final."""
    path = Path(facts["model"]).resolve()
    name = f"{path.parent.name}-{path.name}" if path.name == "final" else path.name
    return name + "-blind" * facts["blind"]


def _unreadable(images: Iterator[Path]) -> set[Path]:
    """The images that cannot be decoded."""

    def bad(image: Path) -> bool:
        with suppress(DataError):
            load_image(image)
            return False
        return True

    unique = list(dict.fromkeys(images))
    with ThreadPoolExecutor(2) as pool:
        return {image for image, broken in zip(unique, pool.map(bad, unique), strict=True) if broken}
