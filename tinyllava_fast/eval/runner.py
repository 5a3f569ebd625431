"""Runs benchmarks on a model: questions to an answerer, answers to JSONL, the official scores to results.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

from tinyllava_fast.data.images import load_image
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.eval.answerer import Answerer, Reply
from tinyllava_fast.eval.answers import CANNED, AnswerLog, asked
from tinyllava_fast.eval.benchmarks.base import Question
from tinyllava_fast.eval.local import LiveModel, LocalModel
from tinyllava_fast.eval.machine import machine, plugins_digest, versions
from tinyllava_fast.eval.official import experiment_name
from tinyllava_fast.eval.options import build
from tinyllava_fast.eval.options import describe as settings
from tinyllava_fast.eval.pictures import Pictures
from tinyllava_fast.eval.plan import Plan, make_plans
from tinyllava_fast.eval.progress import progress
from tinyllava_fast.eval.ranks import Ranks
from tinyllava_fast.eval.results import RESULTS, RUN, conclude, read_results, summarize, write_json
from tinyllava_fast.eval.statistics import histogram
from tinyllava_fast.eval.types import Facts, Results, Timings
from tinyllava_fast.files import remove
from tinyllava_fast.hardware import peak_rss_bytes
from tinyllava_fast.infer.finish import FAILED, UNREADABLE
from tinyllava_fast.log import log

ROUNDS = 3  # how often a question is asked whose pictures change meanwhile
SHOWN = 5  # of the questions that were scored as empty answers, in the log


def evaluate(
    model: str | Path | Answerer,
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
    adapter: str | Path | None = None,
    speculate: int = 0,
    batch_tokens: int = 16384,
    threads: int = 2,
    plugins: Sequence[str] = (),
) -> dict[str, Results]:
    """Evaluate a model folder, or another answerer.

    Returns benchmark name -> the content of output/<name>/results.json, run.json under "run".
    data: the folder of all benchmarks, or of the only one. output: None: see ``default_output``. options:
    "textvqa.ocr=false", ... blind: every image is replaced by a blank one of the mean colour; what is still answered
    right comes from the text alone. limit: only the first questions of each. missing_images: "error", or "empty" to
    score their questions as empty answers. dtype, device, weights, adapter (a folder), speculate, batch_tokens and
    threads are those of a model folder. plugins: those that are loaded, by the names that load_plugins takes; answers
    belong to their code, too.
    A killed run goes on with the questions it has not answered. Under torchrun every rank answers its share of the
    images; the others return {} once rank 0 can score.
    An answer belongs to the model's files, dtype and weights, the prompt, and what its pictures show, in their order:
    what has changed is asked again, and so is a question whose unreadable picture was mended.
    What is wrong with one question (too long for the context, an unreadable picture) costs that one: it is scored as an
    empty answer and counted. Raises UserError for an unknown benchmark, missing files, a folder that is no model or
    whose numbers are not finite, a server that does not answer, and for output that cannot be written.
    """
    ranks = Ranks.of_torchrun()
    with ranks.together():
        plans = make_plans(build(benchmarks, options), data, limit=limit, missing_images=missing_images)
        folder = Path(output) if output is not None else default_output(model, blind)
        if isinstance(model, (str, Path)):
            model = LocalModel(
                model,
                besides=folder,
                dtype=dtype,
                device=ranks.device(device),
                weights=weights,
                adapter=adapter,
                speculate=speculate,
                batch_tokens=batch_tokens,
                threads=threads,
            )
        facts: Facts = {**model.facts, "blind": blind}
        if plugins:
            facts["plugins"] = plugins_digest(plugins)
        every: list[_Evaluation] = []
        results: dict[str, Results] = {}
        for plan in plans:
            every.append(one := _Evaluation(plan, model, facts, folder, ranks))
            one.answer()
            if ranks.world == 1:
                results[plan.name] = one.conclude()
    if ranks.rank == 0:
        results = results or {one.plan.name: one.merge().conclude() for one in every}
        summarize(folder, facts["model_digest"])
    return results


def evaluate_live(model: LiveModel, plans: Sequence[Plan], folder: Path) -> dict[str, Results]:
    """Evaluate a model in memory that changes, one that trains, on plans made before; benchmark -> its results.

    Everything is asked: answers of earlier calls, in folder/<benchmark>, are replaced. No progress is shown.
    Errors as for ``evaluate``.
    """
    results: dict[str, Results] = {}
    for plan in plans:
        for answers in (folder / plan.name).glob("answers*.jsonl"):
            remove(answers)
        remove(folder / plan.name / RESULTS)
        facts: Facts = {**model.facts, "blind": False}
        results[plan.name] = _Evaluation(plan, model, facts, folder, Ranks(), quiet=True).run()
    return results


def default_output(model: str | Path | Answerer, blind: bool) -> Path:
    """Return the default folder of results: runs/demo/final -> runs/demo/eval, or runs/demo/eval-blind.

    Of another answerer: eval-NAME in the working directory.
    """
    if isinstance(model, (str, Path)):
        return Path(model).resolve().parent / ("eval" + "-blind" * blind)
    return Path(f"eval-{_experiment({**model.facts, 'blind': blind})}")


class _Evaluation:
    """One benchmark on one answerer."""

    def __init__(
        self, plan: Plan, answerer: Answerer, facts: Facts, output: Path, ranks: Ranks, *, quiet: bool = False
    ) -> None:
        self.plan = plan
        self.quiet = quiet
        self.answerer = answerer
        self.ranks = ranks
        self.folder = output / plan.name
        self.facts: Facts = {
            **facts,
            "options": settings(plan.benchmark),
            "max_new_tokens": plan.benchmark.max_new_tokens,
        }
        self.blind = facts["blind"]
        self.mine = self.ranks.share(plan.questions)
        self.pictures = Pictures(self.folder, ranks.rank)
        self.answers = self._answers_to(self.mine)
        self._reopen()
        self._known = len(self.answers.records)

    def run(self) -> Results:
        """Answer what is open, then score."""
        self.answer()
        return self.conclude()

    def answer(self) -> None:
        """Answer this rank's open questions."""
        if not (open_ := self._open(self.mine)):
            return
        with self.answers:
            for _ in range(ROUNDS):
                self._answer(open_)
                if not (open_ := self._open(self.mine)):
                    return
                self._look_again()
                open_ = self._open(self.mine)
        raise UserError(
            f"{self.plan.name}: the pictures of {len(open_):,} questions change while they are asked about, the first "
            f"is {open_[0].images[0]}; wait until they are complete and run the same command again"
        )

    def merge(self) -> _Evaluation:
        """Read the answers of the other ranks, which have all finished."""
        self.pictures = Pictures(self.folder, self.ranks.rank)
        self.answers = self._answers_to(self.plan.questions)
        return self

    def conclude(self) -> Results:
        """Score the answers of all ranks and write the results."""
        if open_ := self._open(self.plan.questions):
            raise UserError(f"{self.folder}: {len(open_):,} questions are not answered yet; run the same command again")
        facts: Facts = {**self.facts, "versions": versions()}
        shown = None if self.blind else self.pictures.digest
        self._say_replaced()
        results = conclude(self.plan, self.answers.records, facts, self.folder, _experiment(self.facts), shown)
        if len(self.answers.records) > self._known or not (self.folder / RUN).exists():
            write_json(self.folder / RUN, self._timings())
        for image in results["unreadable_images"][:SHOWN]:
            log.warning("%s: unreadable image, scored as an empty answer: %s", self.plan.name, image)
        for why in list(results["not_answered"].values())[:SHOWN]:
            log.warning("%s: scored as an empty answer: %s", self.plan.name, why)
        headline = next((m for m in results["metrics"] if m["name"] == results["headline"]), None)
        said = (
            "answers written" if headline is None else f"{headline['name']} {headline['value']:.{headline['digits']}f}"
        )
        if not self.quiet:
            log.info("%s%s: %s, %d questions", self.plan.name, " (blind)" * self.blind, said, results["questions"])
        return read_results(self.folder)

    def _say_replaced(self) -> None:
        """Warn where results of more questions lie in the folder: a quick look with --limit is no full evaluation."""
        with suppress(UserError):
            before = read_results(self.folder).get("questions")
            now = len(self.plan.questions)
            if isinstance(before, int) and before > now:
                log.warning(
                    "%s: its results of %d questions are replaced by those of %d; the answers stay, so the command "
                    "that made the former brings them back at once. --output keeps both",
                    self.folder, before, now,
                )  # fmt: skip

    def _answers_to(self, questions: Sequence[Question]) -> AnswerLog:
        # Where the model lies is no part of what it is; options that matter to an answer are seen in its prompt and
        # pictures, and the others (a judge, a seed of the score) must not cost the answers.
        run = {key: value for key, value in self.facts.items() if key not in ("model", "options")}
        if not self.blind:
            self.pictures.look(image for q in questions for image in q.images)
        asked = {q.key: self._asked(q) for q in questions}
        return AnswerLog(self.folder, {"benchmark": self.plan.name, **run}, asked, self.ranks.rank)

    def _asked(self, q: Question) -> str:
        return asked(q, ["blank" if self.blind else self.pictures.digest(image) for image in q.images])

    def _look_again(self) -> None:
        """Reopen the questions about pictures that were changed while they were asked about."""
        self.pictures.look(image for q in self.mine for image in q.images)
        for q in self.mine:
            if (now := self._asked(q)) != self.answers.asked[q.key]:
                self.answers.asked[q.key] = now
                self.answers.records.pop(q.key, None)

    def _reopen(self) -> None:
        """Ask again what another try may answer, and where a picture could not be read and now can, whatever it was
        that has been mended."""
        records = self.answers.records
        for key in [key for key, record in records.items() if record["finish"] in self.answerer.asked_again]:
            del records[key]
        unread = [q for q in self.mine if q.key in records and records[q.key]["finish"] == UNREADABLE]
        bad = _unreadable(image for q in unread for image in q.images)
        for q in unread:
            if not bad.intersection(q.images):
                del records[q.key]

    def _open(self, questions: Sequence[Question]) -> list[Question]:
        return [q for q in questions if q.key not in self.answers.records]

    def _answer(self, questions: Sequence[Question]) -> None:
        """Put questions to the engine, one of each (images, prompt) pair; twins of answered ones are copied."""
        missing = set(self.plan.missing_images)
        for q in questions:
            if q.canned is not None:
                self.answers.add(q.key, q.canned, finish=CANNED)
            elif missing.intersection(q.images):
                self.answers.add(q.key, "", finish=UNREADABLE)
        records = self.answers.records
        whole = (q for q in self.mine if q.key in records and records[q.key]["finish"] != UNREADABLE)
        answered = {self.answers.asked[q.key]: q for q in whole}
        pairs: dict[str, list[Question]] = {}
        for q in self._open(questions):
            if twin := answered.get(self.answers.asked[q.key]):
                self._copy(twin, q)
            else:
                pairs.setdefault(self.answers.asked[q.key], []).append(q)
        if pairs:
            self._ask({twins[0].key: twins for twins in pairs.values()})

    def _ask(self, todo: dict[str, list[Question]]) -> None:
        """Ask the first of each list of twins. What is wrong with one question costs that one: an empty answer."""
        total = len(self.mine)
        first = [twins[0] for twins in todo.values()]
        unasked = (CANNED, UNREADABLE, FAILED)
        resumed = any(record["finish"] not in unasked for record in self.answers.records.values())
        new = self.plan.benchmark.max_new_tokens
        replies = self.answerer.replies(first, new, blind=self.blind, resumed=resumed)
        try:
            with closing(replies):
                shown = replies if self.quiet else progress(replies, total=total, done=total - len(todo))
                for reply in shown:
                    self._add(reply, todo[reply.key])
        except UserError as error:
            raise UserError(f"{self.plan.name}: {error}") from error

    def _add(self, reply: Reply, twins: Sequence[Question]) -> None:
        """Record an answer, unless its pictures are no longer those that were looked at."""
        first, *rest = twins
        if not self.blind and (changed := self.pictures.changed(first.images)):
            log.warning("%s: %s was changed while it was asked about; asking again", self.plan.name, changed[0])
            return
        self.answers.add(
            first.key, reply.text, finish=reply.finish, tokens=reply.tokens, latency=reply.latency, why=reply.why
        )
        for twin in rest:
            self._copy(first, twin)

    def _copy(self, source: Question, twin: Question) -> None:
        """Record the answer to the same prompt about the same pictures."""
        if not self.blind and self.pictures.changed(twin.images):
            return
        record = self.answers.records[source.key]
        why = record.get("why", "").replace(repr(source.key), repr(twin.key))
        self.answers.add(twin.key, record["answer"], finish=record["finish"], tokens=record["tokens"], why=why)

    def _timings(self) -> Timings:
        """Return the times and the machine."""
        seconds, records = self.answers.seconds, self.answers.records
        effort = self.answerer.effort()
        return {
            "answered_now": len(records) - self._known,
            "eval_seconds": round(seconds, 3),
            "questions_per_s": round(len(records) / seconds, 3) if seconds else 0.0,
            "latency": histogram([r["latency"] for r in records.values() if r["latency"] is not None]),
            "peak_rss_bytes": peak_rss_bytes(),
            "engine": effort.counters,
            "dtype": effort.dtype,
            "processes": self.ranks.world,
            "machine": machine(),
        }


def _experiment(facts: Facts) -> str:
    """Return the name that official files carry: the model folder's, with its run's where it is called final."""
    path = Path(facts["model"]).resolve()
    name = f"{path.parent.name}-{path.name}" if path.name == "final" else path.name
    return experiment_name(name) + "-blind" * facts["blind"]


def _unreadable(images: Iterable[Path]) -> set[Path]:
    """Return the images that cannot be decoded."""

    def bad(image: Path) -> bool:
        with suppress(DataError):
            load_image(image)
            return False
        return True

    unique = list(dict.fromkeys(images))
    with ThreadPoolExecutor(2) as pool:
        return {image for image, broken in zip(unique, pool.map(bad, unique), strict=True) if broken}
