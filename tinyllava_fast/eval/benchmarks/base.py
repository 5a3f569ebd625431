"""The contract of a benchmark: questions out of its official files, and the official score of the answers.

A new benchmark is one file in this folder: a subclass of Benchmark, registered under its name. None of it needs torch.

The order of a run: ``locate``, ``questions``, ``counts`` (before a model loads), answers, ``grade`` (a judge, if
there is one), ``score`` (pure), ``outputs`` (official files).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from tinyllava_fast.registry import Registry

Files = Mapping[str, Path]
Answers = Mapping[str, str]
Grades = Mapping[str, Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a benchmark.

    key: unique in the benchmark; answers are stored under it. Where official ids repeat: line_key(index, id).
    id: the official id, as it stands in the official file (its type is kept for official outputs).
    images: paths, in the order of the prompt's ``<image>`` markers; without markers they precede it. () for text only.
    prompt: the user's turn exactly as the reference builds it, without the chat template.
    truth: the right answer as shown to a reader; "" if it is not public. category: what the headline is broken down by.
    choices: option texts of a multiple-choice question. meta: whatever the score and the official outputs need.
    canned: an answer that the protocol prescribes without asking the model.
    """

    key: str
    id: str | int
    images: tuple[Path, ...] = ()
    prompt: str
    truth: str = ""
    category: str = ""
    choices: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    canned: str | None = None

    @property
    def cluster(self) -> str:
        """The cluster for standard errors: the images, or the question itself if it has none."""
        return "\0".join(map(str, self.images)) or self.key


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of a score. value: as the official scorer gives it, unrounded. scale: its maximum (1, 100, 2000), 0 if
    it has none.

    stderr: standard error clustered by image, on the same scale; None where it is not defined. questions: how many
    it is taken over. digits: decimals that the official scorer prints.
    """

    name: str
    value: float
    scale: float = 100.0
    stderr: float | None = None
    questions: int = 0
    digits: int = 2

    def __str__(self) -> str:
        """The value as printed, with its standard error."""
        error = "" if self.stderr is None else f" ± {self.stderr:.{self.digits}f}"
        return f"{self.value:.{self.digits}f}{error}"


@dataclass(frozen=True, kw_only=True)
class Score:
    """The official score of a set of answers.

    metrics: what the field reports, the headline among them. headline: the name of the one that papers report; "" if
        there is none (private labels, no judge), and then notes say why.
    tables: title -> metrics of one breakdown (per category, per subtask, per number of words).
    credit: question key -> 0..1, what the question earned; empty without labels.
    counts: named counts a reader should see (answers that could not be parsed, random choices).
    notes: sentences for the reader.
    """

    metrics: Sequence[Metric] = ()
    headline: str = ""
    tables: Mapping[str, Sequence[Metric]] = field(default_factory=dict)
    credit: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __getitem__(self, name: str) -> Metric:
        """Return the metric of that name. KeyError if there is none."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise KeyError(name)


@dataclass(frozen=True)
class Published:
    """A row of a paper's or model card's table. metric: the name of ours that it is a value of."""

    model: str
    value: float
    metric: str


PUBLISHED_MODELS = (
    "LLaVA-1.5-7B",
    "LLaVA-1.5-13B",
    "TinyLLaVA-Phi-2-SigLIP-3.1B",
    "TinyLLaVA-TinyLlama-CLIP-1.5B",
    "TinyLLaVA-Qwen2-0.5B-SigLIP",
)


def published_rows(metric: str, *values: float | None, split: str = "") -> tuple[Published, ...]:
    """The values of ``metric`` for PUBLISHED_MODELS, in their order; None where a model's table has none.

    split: the part of the benchmark they were measured on, shown beside the model.
    """
    models = (f"{model} ({split})" if split else model for model in PUBLISHED_MODELS)
    pairs = zip(models, values, strict=True)
    return tuple(Published(model, value, metric) for model, value in pairs if value is not None)


@dataclass(frozen=True)
class Count:
    """A number of records known from the official release, and what was found."""

    what: str
    found: int
    expected: int

    def __str__(self) -> str:
        """ "questions: 12,578" or "questions: 12,000 found, 12,578 expected"."""
        if self.found == self.expected:
            return f"{self.what}: {self.found:,}"
        return f"{self.what}: {self.found:,} found, {self.expected:,} expected ({self.found - self.expected:+,})"


@dataclass(frozen=True)
class NoOptions:
    """A benchmark without settings."""


class Benchmark(ABC):
    """The official files of a benchmark, its prompts and its score.

    name: as registered. title: as papers write it. max_new_tokens: the reference's limit. Options: a frozen dataclass
    of the settings that ``--option <name>.<field>=<value>`` takes, each with a default; the class's docstring or
    the fields' comments say what they do. scored_by: those that change what an answer earns. published: rows to
    compare with. in_all: part of ``--benchmarks all``. official: questions and images of the official release, where
    ``counts`` is not overridden.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    max_new_tokens: int = 128
    Options: ClassVar[type[Any]] = NoOptions
    scored_by: ClassVar[Sequence[str]] = ()
    published: ClassVar[Sequence[Published]] = ()
    in_all: ClassVar[bool] = True
    official: ClassVar[tuple[int, int] | None] = None

    def __init__(self, options: object = None) -> None:
        self.options: Any = self.Options() if options is None else options

    @abstractmethod
    def locate(self, root: Path) -> Files:
        """Find the official files below root, which holds all benchmarks or is this benchmark's own folder.

        Use eval.files.Finder. Raises DataError: what is missing, where it was looked for, where to get it.
        """

    @abstractmethod
    def questions(self, files: Files) -> list[Question]:
        """Return all questions in the official order, with their truths. DataError naming file, line and field."""

    def counts(self, files: Files, questions: Sequence[Question]) -> list[Count]:
        """Return numbers of records against those of the official release."""
        return [] if self.official is None else questions_and_images(questions, *self.official)

    def grade(self, questions: Sequence[Question], answers: Answers, folder: Path, experiment: str) -> Grades:
        """Ask a judge, for benchmarks that have one: question key -> a grade 0..1 per run. Resumes in ``folder``.

        {} if there is no judge, or none is configured.
        """
        return {}

    @abstractmethod
    def score(self, questions: Sequence[Question], answers: Answers, grades: Grades | None = None) -> Score:
        """Return the official score of ``answers`` (question key -> text), whatever their order.

        ``questions`` may be a part of the benchmark (--limit). A question without an answer is treated as the official
        scorer treats it; where that raises, so does this (DataError; see require_answers).
        """

    def recorded_prompt(self, question: Question) -> str:
        """Return the "prompt" of the reference's answers file."""
        return question.prompt

    def is_asked_by(self, question: Question, prompt: str) -> bool:
        """Return True if an answers file's "prompt" is this question: tells questions with one official id apart."""
        return prompt.strip() == self.recorded_prompt(question).strip()

    def outputs(
        self, questions: Sequence[Question], answers: Answers, score: Score, files: Files, folder: Path, experiment: str
    ) -> list[Path]:
        """Write the files that official tools read into ``folder`` and return their paths.

        The runner writes the answers JSONL in LLaVA's format by itself (``folder``/answers.jsonl). experiment: the name
        that official file names carry.
        """
        return []


def questions_and_images(questions: Sequence[Question], expected: int, images: int) -> list[Count]:
    """Return the numbers of questions and of images that they are about, against those of a release."""
    found = len({q.images for q in questions})
    return [Count("questions", len(questions), expected), Count("images", found, images)]


BENCHMARKS: Registry[type[Benchmark]] = Registry("benchmark", "tinyllava_fast.eval.benchmarks")


def line_key(index: int, id: str | int) -> str:
    """A unique key for the line ``index`` (from 0) of a file whose ids repeat."""
    return f"{index}:{id}"
