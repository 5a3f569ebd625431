"""A checkpoint of a run, of however many processes, as a model folder: what the run would leave if it ended there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tinyllava_fast.config.load import parse_into
from tinyllava_fast.config.schema import RunConfig, StageConfig
from tinyllava_fast.convert.convert import check_free
from tinyllava_fast.data.anyres import resolve_grid
from tinyllava_fast.data.pictures import REFERENCE, PictureReading
from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.log import log
from tinyllava_fast.models import io
from tinyllava_fast.models.build import build_image_processor, build_tokenizer
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.plugins import load_plugins
from tinyllava_fast.recipes.base import apply_recipe
from tinyllava_fast.tensors import Tensors
from tinyllava_fast.train.checkpoint import CheckpointStore, TrainState, damage, is_checkpoint, load_state
from tinyllava_fast.train.engine.base import LazyTensor
from tinyllava_fast.train.optim import MEAN
from tinyllava_fast.train.output import output_weights
from tinyllava_fast.train.parts import first_model
from tinyllava_fast.train.stage import load_checkpoint
from tinyllava_fast.train.tensor_reader import open_tensors


def consolidate(source: str | Path, target: str | Path) -> Path:
    """Write the model of a checkpoint as a folder that holds all that it needs, atomically.

    source: a checkpoint, or a run folder, of which the newest one that is intact is taken; the run may go on meanwhile.
    Weights are those of the training, bit for bit, as the stage's own folder has them at its end. The files that the
    run's configuration names for the model must be where they were. Needs memory for the model twice.
    Raises UserError if the target exists, or the checkpoint is damaged or does not fit its own configuration.
    """
    check_free(target)
    folder = _intact(Path(source))
    state = load_state(folder)
    config = parse_into(RunConfig, state.config, f"{folder / 'state.json'}: config")
    load_plugins(config.plugins)
    stage = config.stages[state.stage_index]
    tokenizer, processor = build_tokenizer(config.model), build_image_processor(config.model)
    known = dict(state.parts)
    model = first_model(config.model, state, tokenizer, processor, seed=config.seed, dtype=torch.float32)
    if other := [part for part, digest in known.items() if state.parts.get(part) != digest]:
        raise CheckpointError(
            f"{folder}: the {' and the '.join(other)} that its configuration names is not what it was trained with; "
            "put those files back where they were"
        )
    apply_recipe(model, stage.recipe, stage.optim, seed=config.seed)
    load_checkpoint(model, folder)
    _describe(model, stage, state, resolve_grid(stage.data.image_grid, processor))
    with open_tensors(folder / io.WEIGHTS) as weights, open_tensors(folder / "optimizer.safetensors") as optimizer:
        means = any(name.startswith(MEAN) for name in optimizer)
        content = output_weights(
            model,
            _averaged(weights, optimizer),
            _lazy(optimizer),
            means=means,
            following=state.stage_index + 1 < len(config.stages),
            dtype=getattr(torch, config.engine.dtype),
        )
    io.save_model(model, tokenizer, processor, target, state_dict=content)
    log.info("%s: the model of step %d, consolidated from %s", target, state.step, folder)
    return Path(target)


def _intact(source: Path) -> Path:
    """Return the checkpoint; of a run folder the newest whose bytes are as they were written."""
    if (source / "state.json").is_file() or is_checkpoint(source):
        if found := damage(source):
            raise CheckpointError(f"{found}; give another checkpoint, or the run folder, to take the newest intact one")
        return source
    inner = source if source.name == "checkpoints" else source / "checkpoints"
    found_intact = CheckpointStore(inner, 1).intact()
    if found_intact is None:
        load_state(source)  # which says what it is not
        raise CheckpointError(f"{source}: neither a checkpoint nor a run folder that has one")
    return found_intact


def _describe(model: LMM, stage: StageConfig, state: TrainState, grid: Sequence[tuple[int, int]]) -> None:
    """Let the model's configuration say how the stage trains it."""
    data, noted = stage.data, state.readings.get(state.stage)
    model.describe_training(
        template=data.template,
        turns=data.turns,
        image_mode=data.image_mode,
        image_grid=list(grid) if data.image_mode == "anyres" else [],
        reading=PictureReading(**noted) if noted is not None else REFERENCE,
    )


def _lazy(tensors: Tensors) -> list[LazyTensor]:
    return [_item(tensors, name) for name in tensors]


def _item(tensors: Tensors, name: str) -> LazyTensor:
    return LazyTensor(name, tensors.shapes[name], tensors.dtypes[name], lambda: tensors[name])


def _averaged(weights: Tensors, optimizer: Tensors) -> list[LazyTensor]:
    """Return the weights; those that have a running mean are that mean, in their own dtype, as in training."""
    items = []
    for item in _lazy(weights):
        if (name := f"{MEAN}{item.name}") in optimizer:

            def mean(name: str = name, dtype: torch.dtype = item.dtype) -> Tensor:
                return optimizer[name].to(dtype)

            item = replace(item, fetch=mean)
        items.append(item)
    return items
