"""`tlf-train CONFIG --dry-run`: everything that a run needs is looked at, and nothing trains or is left behind.

Memory is reckoned, not measured (train/memory.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from tinyllava_fast import hardware
from tinyllava_fast.config.schema import RunConfig, StageConfig, TuneConfig
from tinyllava_fast.data.loader import Loader
from tinyllava_fast.data.pictures import UPRIGHT, PictureReading
from tinyllava_fast.eval.report.html import size
from tinyllava_fast.models import adapter
from tinyllava_fast.models.build import build_image_processor, build_model, build_tokenizer, check_vocabulary
from tinyllava_fast.models.lmm import COMPONENTS, LMM
from tinyllava_fast.recipes.base import check_recipe
from tinyllava_fast.recipes.rates import layer_count, layer_factor
from tinyllava_fast.train.answers import open_answering
from tinyllava_fast.train.checkpoint import CheckpointStore
from tinyllava_fast.train.engine.launch import Process
from tinyllava_fast.train.lr_schedule import lr_factor, warmup_steps
from tinyllava_fast.train.memory import (
    copied_bytes,
    image_bytes,
    kept_bytes,
    learning_skeleton,
    token_bytes,
    update_bytes,
)
from tinyllava_fast.train.prepare import average_flops, build_loader, look_at_files, of_stage, validation_loader
from tinyllava_fast.train.reading import stage_reading
from tinyllava_fast.train.resume import find_checkpoint
from tinyllava_fast.train.standing import interval
from tinyllava_fast.train.validation import cost_of

ROOM = 0.95  # of the memory that is free: the rest is fragmentation, and what else comes up


@dataclass
class _Parts:
    """The parts of a run that its data is read with (prepare.Readers)."""

    config: RunConfig
    process: Process
    tokenizer: PreTrainedTokenizerBase
    processor: BaseImageProcessor


def dry_run(config: RunConfig, process: Process, resume: str) -> str:
    """Return what a run would do, stage by stage. Raise UserError for what it would be refused for.

    process: as it would train. The run folder is looked at, and neither made nor changed.
    """
    store = CheckpointStore(Path(config.output_dir) / "checkpoints", 1)
    found = find_checkpoint(store, config, resume)
    first = found[1].stage_index if found else 0
    stages = config.stages[first:]
    look_at_files(config, stages, process.world_size)
    lines = [f"goes on from {found[0]}" if found else f"starts in {config.output_dir}"]
    tokenizer, processor = build_tokenizer(config.model), build_image_processor(config.model)
    model = build_model(config.model, seed=config.seed, dtype=torch.float32)
    check_vocabulary(model, tokenizer)
    parts = _Parts(config, process, tokenizer, processor)
    reading = model.config.reading if config.model.path else UPRIGHT
    held = adapter.take(model)
    for stage in stages:
        with of_stage(stage.name):
            check_recipe(model, stage.recipe)
            reading = stage_reading(stage.data, reading)
            loader = build_loader(parts, stage, model, reading)
            lines += [f"stage {stage.name}", *(f"  {line}" for line in _stage(parts, stage, model, loader, reading))]
    if held is not None:
        adapter.attach(model, held, "the model's adapter")
    return "\n".join([*lines, "nothing was trained and nothing was written"])


def _stage(parts: _Parts, stage: StageConfig, model: LMM, loader: Loader, reading: PictureReading) -> Iterator[str]:
    report, dataset = loader.dataset.report, loader.dataset
    packs = len(dataset.plan(0))
    full = report.tokens / max(packs * stage.batch.tokens, 1)
    what = "data of a stream's first shuffle_buffer" if dataset.endless else "data"
    yield (
        f"{what}: {report.records:,} samples, {report.tokens:,} tokens, {report.supervised_tokens:,} of them "
        f"supervised; {packs:,} packs of {stage.batch.tokens:,} tokens, {full:.1%} full"
    )
    if report.unsupervised or report.truncated or dataset.skipped:
        counts = f"{report.unsupervised:,} samples without a supervised token, {report.truncated:,} truncated"
        yield f"      {counts}, {len(dataset.skipped):,} records skipped"
    flops = average_flops(model, stage, loader)
    each = "" if dataset.endless else f", {loader.steps_per_epoch:,.1f} an epoch"
    yield (f"steps: {loader.steps:,} of {stage.batch.packs_per_step} packs{each}; {flops:.2e} FLOPs a step and process")
    yield f"learning rate: {_schedule(stage, loader.steps)}"
    yield from _rates(stage, model)
    yield from _validation(parts, stage, model, loader, reading, flops)
    yield from _memory(parts.config, parts.process, stage, model, loader)


def _schedule(stage: StageConfig, steps: int) -> str:
    """Return the learning rate in words, and at five steps from the first to the last."""
    optim = stage.optim
    rates = []
    for step in sorted({round(share * (steps - 1)) for share in (0, 0.25, 0.5, 0.75, 1)}):
        factor = lr_factor(
            step,
            total_steps=steps,
            schedule=optim.schedule,
            warmup_ratio=optim.warmup_ratio,
            min_lr_ratio=optim.min_lr_ratio,
            decay_ratio=optim.decay_ratio,
        )
        rates.append(f"{optim.lr * factor:.2g} at step {step + 1:,}")
    warm = warmup_steps(steps, optim.warmup_ratio)
    own = {name: getattr(stage.recipe, name).lr for name in ("llm", "vision", "connector")}
    others = "".join(f"; {name} has its own peak, {lr:g}" for name, lr in own.items() if lr is not None)
    return f"{optim.schedule}, {warm:,} steps of warm-up: {', '.join(rates)}{others}"


def _rates(stage: StageConfig, model: LMM) -> Iterator[str]:
    """Yield the peak rates within each component that has more than one."""
    for name in COMPONENTS:
        tune: TuneConfig = getattr(stage.recipe, name)
        lr = stage.optim.lr if tune.lr is None else tune.lr
        if tune.layer_decay != 1.0:
            layers = layer_count(model, name)
            words = {0: "embedding", 1: "first layer", layers: "last layer", layers + 1: "above it"}
            each = (
                f"{words[depth]} {lr * layer_factor(tune.layer_decay, layers, depth):.2g}" for depth in sorted(words)
            )
            yield f"      {name} by layer, {tune.layer_decay:g} times from each to the one below: {', '.join(each)}"
        if tune.lora.b_lr_ratio != 1.0:
            ratio = tune.lora.b_lr_ratio
            yield f"      {name}: B of its adapters has {ratio:g} times the rate of A, at most {lr * ratio:.2g}"


def _validation(
    parts: _Parts, stage: StageConfig, model: LMM, loader: Loader, reading: PictureReading, flops: float
) -> Iterator[str]:
    validation = stage.validation
    if not validation.on:
        return
    held = validation_loader(parts, stage, model, reading) if validation.has_data else None
    records = None if held is None else held.dataset.data
    answering = open_answering(parts.config, stage, records, parts.tokenizer, parts.processor)
    samples, plans = (answering.samples, answering.plans) if answering is not None else ([], [])
    every = interval(validation, loader.steps, cost := cost_of(model, stage, held, answering, flops))
    when = f"every {every:,} steps and at the end" if every else "at the end"
    what = [f"{held.dataset.report.records:,} samples"] if held is not None else []
    what += [f"{len(samples)} of them answered"] if samples else []
    what += [f"{len(plan.questions):,} questions of {plan.name}" for plan in plans]
    times = -(-loader.steps // every) if every else 1
    yield f"validation: {', '.join(what)}, {when}; it takes about {times * cost / loader.steps:.1%} of the work"


def _memory(config: RunConfig, process: Process, stage: StageConfig, model: LMM, loader: Loader) -> Iterator[str]:
    """Yield what a process needs for the stage, and whether this machine has it."""
    try:
        skeleton = learning_skeleton(model, stage, config.engine, seed=config.seed)
        kept = kept_bytes(skeleton, stage, config.engine, process)
    except (NotImplementedError, RuntimeError) as error:
        yield f"memory: not reckoned for this recipe ({str(error).splitlines()[0]})"
        return
    images = int(loader.dataset.images.max(initial=0)) if stage.batch.max_images else 0
    step = stage.batch.tokens * token_bytes(model, stage, config.engine)
    step += min(stage.batch.max_images, max(images, 1)) * image_bytes(model, stage, config.engine)
    update = update_bytes(skeleton, config.engine, process)  # when the activations are gone
    need = sum(kept.values()) + max(step, update)
    copied = copied_bytes(skeleton, stage, process)
    on_cpu, chosen = process.device.type == "cpu", config.checkpoint.asynchronous
    background = chosen is True or (chosen == "auto" and not on_cpu)
    need += copied if background and on_cpu else 0
    where, free = _free_bytes(process)
    what = ", ".join(f"{name} {size(count)}" for name, count in kept.items() if count)
    what += f", activations about {size(step)}"
    what += f", after them {size(update)} of the update" if update else ""
    what += f", the copy of a checkpoint {size(copied)}" if background and on_cpu else ""
    yield f"memory: about {size(need)} a process ({what})"
    if need > ROOM * free:
        yield f"        DOES NOT FIT {where}: {size(free)} are free{_remedy(stage)}"
    else:
        yield f"        fits {where}: {size(free)} are free"
    if background and not on_cpu:
        yield (
            f"        checkpoints in the background: copies of about {size(copied)} a process in the host's memory"
            + ("" if chosen is True else ", if twice that is free for all processes of the machine")
        )


def _remedy(stage: StageConfig) -> str:
    return (
        f"; lower stages.{stage.name}.batch.tokens, set engine.gradient_checkpointing=true, take an 8-bit optimizer, "
        "or tune: lora or qlora"
    )


def _free_bytes(process: Process) -> tuple[str, int]:
    if process.device.type == "cuda":
        return f"the GPU {torch.cuda.get_device_name(process.device)}", torch.cuda.mem_get_info(process.device)[0]
    return "this machine", hardware.available_memory_bytes() // max(process.world_size, 1)
