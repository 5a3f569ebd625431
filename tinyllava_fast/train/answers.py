"""The model's answers while it trains: to a few held-out questions, always the same, and to benchmarks.

Both go through the project's own engine, on the weights as they are at that step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypedDict

from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from tinyllava_fast.config.schema import DataConfig, EngineConfig
from tinyllava_fast.config.validation import ValidationConfig
from tinyllava_fast.data.formats._base import base_of
from tinyllava_fast.data.records import Refused, read_refusing
from tinyllava_fast.data.split import Split, image_key, place_of
from tinyllava_fast.data.types import IMAGE_TOKEN
from tinyllava_fast.errors import UserError
from tinyllava_fast.eval.local import LiveModel
from tinyllava_fast.eval.options import build as build_options
from tinyllava_fast.eval.plan import Plan, make_plans
from tinyllava_fast.eval.runner import evaluate_live
from tinyllava_fast.eval.types import Results
from tinyllava_fast.infer.assistant import Assistant
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.models.lmm import LMM

FOLDER = "validation"
"""The folder of a run for what benchmarks write: validation/<stage>/<benchmark>, of the last validation."""
_LOOKED_AT = 64  # held-out records that are read for each sample, so that the samples are not the file's first ones
_POOL_TOKENS = 4096  # K/V rows, if a pack is no larger


class SampleRow(TypedDict):
    """A held-out question. image: path of the first picture, or "". now, before: answers to it, "" for none yet."""

    question: str
    truth: str
    image: str
    now: str
    before: str


@dataclass(frozen=True)
class Sample:
    """The first question of a held-out record. images: paths."""

    key: str
    question: str
    truth: str
    images: tuple[str, ...]
    interleaved: bool

    def request(self, max_new_tokens: int) -> Request:
        """Return the question as the engine takes it, answered greedily."""
        images = list(self.images) if self.interleaved else next(iter(self.images), None)
        sampling = Sampling(max_new_tokens=max_new_tokens)
        return Request.ask(self.question, images or None, sampling=sampling, id=self.key)


def choose_samples(data: DataConfig, split: Split | None, count: int) -> list[Sample]:
    """Return questions of different pictures, as far as there are any, that follow from the records alone."""
    found: list[Sample] = []
    each = data.each()
    for source, alone in each:
        looked_at = islice(_usable(alone, split), _LOOKED_AT * count)
        by_picture: dict[object, Sample] = {}
        for sample in sorted(looked_at, key=lambda sample: place_of(sample.key)):
            by_picture.setdefault(sample.images or sample.question, sample)
        most = -(-count // len(each))
        chosen = list(by_picture.values())[:most]
        named = f"{source.title}: " * (len(each) > 1)
        found += [replace(sample, key=f"{named}{sample.key}") for sample in chosen]
    return found[:count]


def _usable(data: DataConfig, split: Split | None) -> Iterator[Sample]:
    """Yield the first question of each record of a source that is held out and whose pictures are files.

    Of a split, records without a picture are left out: it goes by their tokens, which are not known here.
    """
    base = base_of(data.records)
    for record in read_refusing(data.records):
        if isinstance(record, Refused) or (split and not record.images):
            continue
        if split and not split.takes([image_key(image, base) for image in record.images]):
            continue
        question, truth = record.turns[0]
        shown = question.count(IMAGE_TOKEN) if record.interleaved else len(record.images)
        images = tuple(os.path.join(data.image_folder, name) for name in record.images[:shown])
        if all(map(os.path.isfile, images)):
            yield Sample(f"{record.index}: {record.id}", question, truth, images, record.interleaved)


def assistant_of(
    model: LMM, tokenizer: PreTrainedTokenizerBase, processor: BaseImageProcessor, *, tokens: int
) -> Assistant:
    """Return the model in training, which is in eval mode now, as one that answers. tokens: of a pack."""
    return Assistant.around(
        model,
        tokenizer,
        processor,
        batch_tokens=max(tokens, _POOL_TOKENS),
        compile=False,
        source="the model in training",
    )


def answer_samples(assistant: Assistant, samples: Sequence[Sample], config: ValidationConfig) -> dict[str, str]:
    """Return the answer to each sample by its key; of one that cannot be put to the model, the reason in brackets."""
    requests = [sample.request(config.max_new_tokens) for sample in samples]
    answers = assistant.engine.run(requests, keep_going=True)
    return {answer.id: f"({answer.why})" if answer.why else answer.text for answer in answers}


class Answering:
    """The questions that a stage's model is asked at each validation. plans: of benchmarks. folder: of their files."""

    def __init__(
        self,
        config: ValidationConfig,
        samples: Sequence[Sample],
        plans: Sequence[Plan],
        folder: Path,
        *,
        tokenizer: PreTrainedTokenizerBase,
        processor: BaseImageProcessor,
        tokens: int,
    ) -> None:
        self.samples, self.plans = samples, plans
        self._config, self._folder, self._tokens = config, folder, tokens
        self._tokenizer, self._processor = tokenizer, processor

    def ask(self, model: LMM, name: str) -> tuple[dict[str, str], dict[str, float]]:
        """Return the answers to the samples by key, and the headline of each benchmark. name: of the model as it is."""
        assistant = assistant_of(model, self._tokenizer, self._processor, tokens=self._tokens)
        answers = answer_samples(assistant, self.samples, self._config)
        results = evaluate_live(LiveModel(assistant, name), self.plans, self._folder)
        return answers, {benchmark: _headline(found) for benchmark, found in results.items()}


def check_answering(validation: ValidationConfig, engine: EngineConfig, where: str) -> None:
    """Raise UserError for benchmarks where no process has the whole weights."""
    if validation.benchmarks and not has_whole_weights(engine):
        raise UserError(
            f"{where}.validation.benchmarks: FSDP and ZeRO 3 shard the weights, which answers need whole; "
            "set engine.type: ddp or engine.zero_stage: 2, or leave the benchmarks out"
        )


def has_whole_weights(engine: EngineConfig) -> bool:
    """Return whether each process has the whole model."""
    return engine.sharding < 3


def plan_benchmarks(config: ValidationConfig, root: str) -> list[Plan]:
    """Return the benchmarks of a stage with their questions. root: that their folders are relative to.

    Raise UserError for what tlf-eval refuses, and for a benchmark without a score of its own.
    """
    return [
        plan
        for one in config.benchmarks
        for plan in make_plans(
            build_options([one.name], [f"{one.name}.{key}={_text(value)}" for key, value in one.options.items()]),
            os.path.join(root, one.data),
            limit=one.limit,
        )
    ]


def _text(value: object) -> str:
    """Return a setting as --option of tlf-eval has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _headline(results: Results) -> float:
    metric = next((metric for metric in results["metrics"] if metric["name"] == results["headline"]), None)
    if metric is None:
        raise UserError(
            f"validation.benchmarks: {results['benchmark']} has no score of its own, its answers are scored elsewhere; "
            "take another one"
        )
    return metric["value"]


def rows(samples: Sequence[Sample], now: dict[str, str], before: dict[str, str]) -> list[SampleRow]:
    """Return the table of samples. now, before: answers by key."""
    return [
        {
            "question": " ".join(sample.question.replace(IMAGE_TOKEN, " ").split()),
            "truth": sample.truth,
            "image": sample.images[0] if sample.images else "",
            "now": now.get(sample.key, ""),
            "before": before.get(sample.key, ""),
        }
        for sample in samples
    ]
