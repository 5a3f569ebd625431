"""The data of a stage as a loader, and the look at all later stages before the first one starts.

A mistake in the second stage is found before the first one trains for hours: names and files of every stage, then
every record of the later ones, parsed, tokenized, packed and dropped again. That costs one more pass over their
records, and never holds two data sets in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Protocol, TypedDict

from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from tinyllava_fast import slurm
from tinyllava_fast.config.augment import AugmentConfig
from tinyllava_fast.config.schema import (
    BatchConfig,
    DataConfig,
    EngineConfig,
    OptimConfig,
    RecipeConfig,
    RunConfig,
    StageConfig,
)
from tinyllava_fast.config.validation import ValidationConfig
from tinyllava_fast.data.balance import PackCosts
from tinyllava_fast.data.dataset import PackedDataset
from tinyllava_fast.data.loader import Loader, check_length, check_packs
from tinyllava_fast.data.packs import PackSource
from tinyllava_fast.data.pictures import PictureReading
from tinyllava_fast.data.records import Refused, read_refusing
from tinyllava_fast.data.split import Split
from tinyllava_fast.data.streamed import StreamedDataset
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.errors import CheckpointError, DataError, UserError
from tinyllava_fast.hardware import torchrun_number
from tinyllava_fast.models import adapter
from tinyllava_fast.models.flops import costs_of, step_flops
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.recipes.base import check_recipe, find_recipe
from tinyllava_fast.train.answers import plan_benchmarks
from tinyllava_fast.train.engine.launch import Process
from tinyllava_fast.train.noise import check_noise
from tinyllava_fast.train.profile import trains
from tinyllava_fast.train.reading import stage_reading


class _Common(TypedDict):
    """What every data set needs."""

    tokenizer: PreTrainedTokenizerBase
    processor: BaseImageProcessor
    tokens_per_image: int
    seed: int


class Readers(Protocol):
    """The parts of a Run that its data is read with."""

    config: RunConfig
    process: Process
    tokenizer: PreTrainedTokenizerBase
    processor: BaseImageProcessor


_SECTIONS = {
    "data": DataConfig,
    "batch": BatchConfig,
    "recipe": RecipeConfig,
    "optim": OptimConfig,
    "validation": ValidationConfig,
}
_KEYS = re.compile(
    r"(?<![\w./\\-])(?:" + "|".join(rf"{s}\.{f.name}\b" for s, cls in _SECTIONS.items() for f in fields(cls)) + ")"
)


_MOST_WORKERS = 8  # by themselves; a run may ask for more
_NAMED = re.compile(r"(?:^|\s)stages[.\[]")  # a key of a stage, which may be another one than that which looks ahead


@dataclass(frozen=True)
class Outlook:
    """A stage to come. steps: its optimizer steps. flops: of an average one, of this process."""

    steps: int
    flops: float


@contextmanager
def of_stage(name: str) -> Iterator[None]:
    """Name the stage in the error of what happens inside, and its keys in full, as an override has them."""
    try:
        yield
    except UserError as error:
        text = _KEYS.sub(lambda found: f"stages.{name}.{found.group()}", str(error))
        kind = next(kind for kind in (CheckpointError, DataError, UserError) if isinstance(error, kind))
        raise kind(text if _NAMED.search(text) or f"stages.{name}" in text else f"stages.{name}: {text}") from error


@contextmanager
def of_validation(stage: StageConfig) -> Iterator[None]:
    """Name the keys of the validation, where it has records of its own, in the error of what happens inside."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for key in ("records", "image_folder") if stage.validation.records else ():
            text = text.replace(f"data.{key}", f"validation.{key}")
        kind = next(kind for kind in (CheckpointError, DataError, UserError) if isinstance(error, kind))
        raise kind(text if "validation" in text else f"validation: {text}") from error


def look_at_files(config: RunConfig, stages: Sequence[StageConfig], world_size: int) -> None:
    """Look at the names, numbers and the first record of each stage; UserError. It costs next to nothing, so it comes
    first.
    """
    for stage in stages:
        with of_stage(stage.name):
            check_packs(stage.batch.packs_per_step, world_size)
            check_noise(stage, config.engine, world_size)
            check_length(stage.data, stage.max_steps)
            _check_share(stage)
            find_recipe(stage.recipe)
            TEMPLATES.get(stage.data.template, "data.template")
            _look_at_records(stage.data.under(config.data_root))
            if stage.validation.records:
                with of_validation(stage):
                    _look_at_records(_held_out(stage).data.under(config.data_root))


def look_ahead(run: Readers, later: Sequence[StageConfig], model: LMM, reading: PictureReading) -> list[Outlook]:
    """Check the recipe, every record and the packs of each later stage as it would do itself; UserError.

    model: of the stage before, no recipe applied; it is left as it is. reading: how that stage reads pictures.
    """
    found, config = [], run.config
    held = adapter.take(model) if later else None
    for stage in later:
        with of_stage(stage.name):
            check_recipe(model, stage.recipe)
            reading = stage_reading(stage.data, reading)
            loader = build_loader(run, stage, model, reading)
            found.append(Outlook(loader.steps, average_flops(model, stage, loader)))
            if stage.validation.has_data:
                validation_loader(run, stage, model, reading)
            plan_benchmarks(stage.validation, config.data_root)
    if held is not None:
        adapter.attach(model, held, "the model's adapter")
    return found


def build_loader(
    run: Readers, stage: StageConfig, model: LMM, reading: PictureReading, *, held_out: bool = False
) -> Loader:
    """Return the stage's data set in a loader, at the first pack. Raise UserError for data that cannot be trained on.

    reading: how the stage reads pictures, whatever its keys say. held_out: take the records that validation.share holds
    out, which are otherwise left out.
    """
    config, process = run.config, run.process
    data = replace(stage.data.under(config.data_root), **asdict(reading))
    _check_window(stage, model)
    common: _Common = {
        "tokenizer": run.tokenizer,
        "processor": run.processor,
        "tokens_per_image": model.tokens_per_image,
        "seed": config.seed,
    }
    split = Split(share, held_out) if (share := stage.validation.share) else None
    dataset = (
        StreamedDataset(data, stage.batch, **common)
        if data.streams
        else PackedDataset(data, stage.batch, split=split, **common)
    )
    if not dataset.report.supervised_tokens:
        raise UserError(
            f"stages.{stage.name}.data: no sample of {dataset.where} has a supervised token, so nothing "
            f"can be learnt; does template {data.template!r} suit the tokenizer and the records?"
        )
    return Loader(
        dataset,
        packs_per_step=stage.batch.packs_per_step,
        epochs=stage.epochs,
        max_steps=stage.max_steps,
        rank=process.rank,
        world_size=process.world_size,
        workers=_workers(config.engine, process),
        prefetch=config.engine.prefetch,
        pin_memory=process.device.type == "cuda",
        costs=pack_costs(model, stage, dataset),
    )


def _check_share(stage: StageConfig) -> None:
    """Raise UserError for a share of records that are never all there."""
    if stage.validation.share and stage.data.streams:
        raise UserError(
            f"validation.share: {stage.validation.share:g} of a stream cannot be held out, since its records are not "
            "known before they are trained on; name others in validation.records (tlf-data split makes them)"
        )


def _look_at_records(data: DataConfig) -> None:
    """Look at the template and the first record of each source."""
    for source, alone in data.each():
        TEMPLATES.get(alone.template, f"data.sources.{source.title}.template")
        first = next(read_refusing(alone.records))
        if isinstance(first, Refused) and alone.on_error == "fail":
            raise first


def validation_loader(run: Readers, stage: StageConfig, model: LMM, reading: PictureReading) -> Loader:
    """Return what the stage is validated with in a loader, once through, at the first pack; errors as for training."""
    with of_validation(stage):
        held = replace(_held_out(stage), batch=replace(stage.batch, packs_per_step=run.process.world_size))
        return build_loader(run, replace(held, epochs=1.0, max_steps=None), model, reading, held_out=True)


def _held_out(stage: StageConfig) -> StageConfig:
    """Return a stage whose data is what it is validated with: other records, or its own once; never augmented."""
    data, validation = replace(stage.data, augment=AugmentConfig()), stage.validation
    if validation.records:
        folder = validation.image_folder or data.image_folder
        data = replace(data, records=validation.records, image_folder=folder, sources=[], stream=False)
    once = [replace(source, weight=None, samples=None, times=None) for source in data.sources]
    return replace(stage, data=replace(data, sources=once))


def _workers(engine: EngineConfig, process: Process) -> int:
    """Return engine.workers, or as many as the machine has cores for."""
    if engine.workers is not None:
        return engine.workers
    own = slurm.own_cores(torchrun_number("LOCAL_WORLD_SIZE", 1))
    return min(max(own - 1, 1), _MOST_WORKERS) if process.device.type == "cuda" else 1


def average_flops(model: LMM, stage: StageConfig, loader: Loader) -> float:
    """Return the FLOPs of an average step of this process."""
    epoch, batch = loader.dataset.epoch_sizes(), stage.batch
    tokens = batch.packs_per_step * batch.tokens
    samples = max(round(tokens * epoch.samples / max(epoch.tokens, 1)), 1)
    share = samples / epoch.samples
    supervised = round(epoch.supervised_tokens * share)
    images = round(epoch.images * share)
    lengths = [tokens // samples] * samples
    flops = step_flops(costs_of(model), lengths, images, supervised, trains(stage.recipe))
    return sum(flops.values()) / loader.world_size


def pack_costs(model: LMM, stage: StageConfig, dataset: PackSource) -> PackCosts:
    """Return what packs of the stage take, in FLOPs."""
    costs, learns = costs_of(model), trains(stage.recipe)
    token = step_flops(costs, [1], 0, 0, learns)
    image = step_flops(costs, [], 1, 0, learns)
    supervised = step_flops(costs, [], 0, 1, learns)["head"]
    epoch = dataset.epoch_sizes()
    text = max(epoch.tokens - epoch.images * dataset.tokens_per_image, 1.0)
    return PackCosts(
        pack=float(token["decoder"] * stage.batch.tokens),  # it computes what nothing fills, too
        image=float(image["connector"] + (0 if stage.data.feature_cache else image["tower"])),
        pair=float(token["attention"]),
        text=supervised * epoch.supervised_tokens / text,
    )


def _check_window(stage: StageConfig, model: LMM) -> None:
    """Raise UserError for shared prefixes in a model that sees only the last tokens (models/attention.py)."""
    text = model.llm.config
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if not window or (kinds is not None and "sliding_attention" not in kinds):
        return
    independent = any(alone.turns == "independent" for _, alone in stage.data.each())
    if independent and window < stage.batch.tokens:
        raise UserError(
            f"data.turns=independent shares prefixes, but {type(model.llm).__name__} sees only the last {window} "
            f"tokens and batch.tokens={stage.batch.tokens}; set data.turns=conversation, or batch.tokens to at most "
            f"{window}"
        )
