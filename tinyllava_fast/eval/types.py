"""The JSON objects that an evaluation stores: lines of answers.jsonl and verdicts.jsonl, results.json, run.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from typing import NotRequired  # Python 3.11


class AnswerRecord(TypedDict, total=False):
    """A line of answers.jsonl; of an official answers file only the answer is known."""

    key: str
    answer: str
    tokens: int
    finish: str
    """As in infer.types.Answer, or CANNED."""
    latency: float | None
    """Seconds in the engine; None for a copied answer."""
    seconds: float
    """Of this session, when the answer came."""
    asked: str
    """Digest of the question as it was put (eval.answers.asked)."""
    why: str
    """The fault of a question that could not be put to the model."""


class Verdict(TypedDict):
    """A line of verdicts.jsonl; older versions did not write all fields."""

    key: str
    id: str | int
    category: str
    prompt: str
    images: list[str]
    pictures: list[str] | None
    """Digests of what the images show; None where no picture was looked at."""
    truth: str
    answer: str | None
    credit: float | None
    finish: str | None


class MetricRow(TypedDict):
    """A Metric of benchmarks.base."""

    name: str
    value: float
    scale: float
    stderr: float | None
    questions: int
    digits: int


class PublishedRow(TypedDict):
    """A published value, and how far this model is from it; None where it has no such metric."""

    model: str
    value: float
    metric: str
    difference: float | None
    digits: int


class Histogram(TypedDict, total=False):
    """Percentiles, and counts in equal bins from 0 to the maximum; empty of nothing."""

    count: int
    p50: float
    p95: float
    p99: float
    max: float
    bins: list[int]


class Machine(TypedDict):
    """The computer that a result was measured on."""

    processor: str
    cores: int
    threads: int
    memory_bytes: int
    system: str
    accelerator: NotRequired[str]


class Timings(TypedDict):
    """run.json: how long an evaluation took and on what."""

    answered_now: int
    eval_seconds: float
    questions_per_s: float
    latency: Histogram
    peak_rss_bytes: int
    engine: dict[str, int]
    """Counters of the engine; empty if no model was opened."""
    dtype: str
    processes: int
    machine: Machine


class Facts(TypedDict, total=False):
    """The facts that identify an evaluation."""

    model: str
    answers: str
    """The answers file that was scored, in place of a model."""
    model_digest: str
    endpoint: str
    """URL of the server that has the model, where it is no folder."""
    dtype: str
    blind: bool
    weights: str
    plugins: str
    """Digest of the plugins' code."""
    options: Mapping[str, object]
    max_new_tokens: int
    versions: Mapping[str, str]


class Results(Facts, total=False):
    """results.json: the same for the same answers. run: the content of run.json, once it has been read."""

    benchmark: str
    title: str
    questions: int
    headline: str
    metrics: list[MetricRow]
    tables: dict[str, list[MetricRow]]
    counts: dict[str, int]
    notes: Sequence[str]
    unreadable_images: list[str]
    not_answered: dict[str, str]
    count_differences: list[str]
    published: list[PublishedRow]
    limit: int | None
    config_hash: str
    run: Timings
