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

from PIL import Image
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from tinyllava_fast.config.schema import DataConfig, EngineConfig, RunConfig, StageConfig
from tinyllava_fast.config.validation import ValidationConfig
from tinyllava_fast.data.formats._base import base_of
from tinyllava_fast.data.formats._embedded import Embedded, picture_of
from tinyllava_fast.data.images import load_image
from tinyllava_fast.data.records import Refused, read_refusing
from tinyllava_fast.data.split import Split, image_key, place_of
from tinyllava_fast.data.types import IMAGE_TOKEN
from tinyllava_fast.errors import DataError, UserError
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
    """A held-out question. image: the first picture, "" for none. now, before: answers to it, "" for none yet."""

    question: str
    truth: str
    image: str | Embedded
    now: str
    before: str


@dataclass(frozen=True)
class Sample:
    """The first question of a held-out record. images: paths, or files inside the source.

    template: that its source is trained with. system: text of the record's own.
    """

    key: str
    question: str
    truth: str
    images: tuple[str | Embedded, ...]
    interleaved: bool
    template: str
    system: str | None = None

    def request(self, max_new_tokens: int) -> Request:
        """Return the question as the engine takes it, answered greedily. DataError for a picture that is gone."""
        images = [image if isinstance(image, str) else image.read() for image in self.images]
        shown = images if self.interleaved else next(iter(images), None)
        system = [] if self.system is None else [{"from": "system", "value": self.system}]
        return Request(
            messages=[*system, {"from": "human", "value": self.question}],
            image=shown or None,
            sampling=Sampling(max_new_tokens=max_new_tokens),
            id=self.key,
        )


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
    """Yield the first question of each record of a source that is held out and whose pictures are there.

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
        images = tuple(picture_of(name, data.image_folder, base) for name in record.images[:shown])
        if all(map(_is_there, images)):
            key = f"{record.index}: {record.id}"
            yield Sample(key, question, truth, images, record.interleaved, data.template, record.system)


def _is_there(image: str | Embedded) -> bool:
    if isinstance(image, str):
        return os.path.isfile(image)
    try:
        return bool(image.read())
    except DataError:
        return False


def picture(row: SampleRow, side: int) -> Image.Image | None:
    """Return the picture of a sample, its longer side at most ``side`` pixels; None without one that can be read."""
    if not row["image"]:
        return None
    try:
        image = load_image(row["image"])
    except DataError:  # its answer says why
        return None
    image.thumbnail((side, side))
    return image


def assistant_of(
    model: LMM,
    tokenizer: PreTrainedTokenizerBase,
    processor: BaseImageProcessor,
    *,
    tokens: int,
    template: str | None = None,
) -> Assistant:
    """Return the model in training, which is in eval mode now, as one that answers. tokens: of a pack.

    template: name of a chat template; None: the model's.
    """
    return Assistant.around(
        model,
        tokenizer,
        processor,
        template=template,
        batch_tokens=max(tokens, _POOL_TOKENS),
        compile=False,
        source="the model in training",
    )


def answer_samples(assistant: Assistant, samples: Sequence[Sample], config: ValidationConfig) -> dict[str, str]:
    """Return the answer to each sample by its key; of one that cannot be put to the model, the reason in brackets."""
    requests, found = [], {}
    for sample in samples:
        try:
            requests.append(sample.request(config.max_new_tokens))
        except DataError as error:
            found[sample.key] = f"({error})"
    answers = assistant.engine.run(requests, keep_going=True)
    return found | {answer.id: f"({answer.why})" if answer.why else answer.text for answer in answers}


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
        answers: dict[str, str] = {}
        for template in dict.fromkeys(sample.template for sample in self.samples):
            asked = [sample for sample in self.samples if sample.template == template]
            answers |= answer_samples(self._assistant(model, template), asked, self._config)
        if not self.plans:
            return answers, {}
        results = evaluate_live(LiveModel(self._assistant(model), name), self.plans, self._folder)
        return answers, {benchmark: _headline(found) for benchmark, found in results.items()}

    def _assistant(self, model: LMM, template: str | None = None) -> Assistant:
        return assistant_of(model, self._tokenizer, self._processor, tokens=self._tokens, template=template)


def open_answering(
    config: RunConfig,
    stage: StageConfig,
    held_out: DataConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    processor: BaseImageProcessor,
) -> Answering | None:
    """Return what the stage's model is asked at each validation, if there is anything; nothing is written.

    held_out: the records that are held out, if there are any. UserError as ``plan_benchmarks``.
    """
    validation, share = stage.validation, stage.validation.share
    plans = plan_benchmarks(validation, config.data_root)
    samples: list[Sample] = []
    if held_out is not None and validation.samples and has_whole_weights(config.engine):
        split = Split(share, held_out=True) if share else None
        samples = choose_samples(held_out, split, validation.samples)
    if not samples and not plans:
        return None
    return Answering(
        *(validation, samples, plans, Path(config.output_dir) / FOLDER / stage.name),
        tokenizer=tokenizer,
        processor=processor,
        tokens=stage.batch.tokens,
    )


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
