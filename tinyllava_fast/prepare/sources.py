"""What tlf-data looks at: the records that a command line names, or every source of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tinyllava_fast.config.load import load_run
from tinyllava_fast.config.schema import BatchConfig, DataConfig
from tinyllava_fast.data.anyres import count_inputs, resolve_grid, tile_size
from tinyllava_fast.data.formats._base import base_of
from tinyllava_fast.data.limits import PackLimits
from tinyllava_fast.data.templates.base import TEMPLATES, Template
from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log
from tinyllava_fast.ops import pack_plan

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

_CONFIGS = (".yaml", ".yml")


@dataclass(frozen=True)
class Fit:
    """What the samples of a source have to fit into. tile: pixels of a tower input. grid: of anyres, else empty."""

    batch: BatchConfig
    limits: PackLimits
    tile: tuple[int, int]
    grid: tuple[tuple[int, int], ...] = ()

    @property
    def tokens_per_image(self) -> int:
        """Positions of a tower input."""
        return self.limits.tokens_per_image

    def inputs(self, size: tuple[int, int]) -> int:
        """Return the tower inputs of an image of (width, height) pixels."""
        return count_inputs(size, self.grid, self.tile) if self.grid else 1

    def packs(self, lengths: np.ndarray, images: np.ndarray, segments: np.ndarray) -> int:
        """Return how many packs samples fill, in a random order. Each is [n]: what the samples need."""
        order = np.random.default_rng(0).permutation(len(lengths))
        first, second, third = (torch.from_numpy(c[order].astype(np.int64)) for c in (lengths, images, segments))
        packs = pack_plan(first, second, third, *self.batch.room)
        return int(packs.max()) + 1 if len(packs) else 0


@dataclass(frozen=True)
class LookedAt:
    """One source. data: of it alone. tokenizer: None leaves tokens out. fit: None where no run says it."""

    name: str
    data: DataConfig
    tokenizer: PreTrainedTokenizerBase | None
    fit: Fit | None = None

    @property
    def template(self) -> Template:
        """The chat template that its records are shown with."""
        return TEMPLATES.get(self.data.template, "data.template")


def looked_at(
    target: str, image_folder: str | None = None, template: str | None = None, tokenizer: str | None = None
) -> list[LookedAt]:
    """Return the sources of a run's configuration (a YAML file), each once, or the only one that records are.

    image_folder, template: of records, in place of their own folder and of llama; a configuration names them itself.
    tokenizer: folder or hub id; None: of a configuration its own, of records none. UserError.
    """
    from tinyllava_fast.data.tokenizer import load_tokenizer

    own = None if tokenizer is None else load_tokenizer(tokenizer)
    if Path(target).suffix not in _CONFIGS:
        folder = str(base_of(target)) if image_folder is None else image_folder
        data = DataConfig(records=target, image_folder=folder, template=template or "llama")
        found = [LookedAt(target, data, own)]
    else:
        if image_folder is not None or template is not None:
            raise UserError(f"{target}: a configuration names its image folders and templates; leave out the flags")
        found = _of_run(target, own)
    for one in found:
        if one.tokenizer is not None:
            one.template.check(one.tokenizer, one.data.masks)
    return found


def _of_run(path: str, tokenizer: PreTrainedTokenizerBase | None) -> list[LookedAt]:
    from tinyllava_fast.models import build

    run = load_run(path)
    tokenizer = build.build_tokenizer(run.model) if tokenizer is None else tokenizer
    build.check_stated_vocabulary(run.model, tokenizer)
    try:
        per_image, processor = build.tokens_per_image(run.model), build.build_image_processor(run.model)
    except UserError as error:
        log.warning("%s: whether samples fit into packs is not looked at: %s", path, error)
        processor = None
    found: list[LookedAt] = []
    known = set()
    for stage in run.stages:
        sets = [(f"{stage.name}.{one.title}", alone) for one, alone in stage.data.under(run.data_root).each()]
        if validation := stage.validation.records:
            folder = stage.validation.image_folder or stage.data.image_folder
            held = replace(stage.data, records=validation, image_folder=folder, sources=[])
            sets.append((f"{stage.name}.validation", held.under(run.data_root)))
        for name, data in sets:
            fit = None if processor is None else _fit(data, stage.batch, per_image, processor)
            key = (data.records, data.image_folder, data.template, data.turns, data.turns_per_sample, data.masks)
            if (key, fit) not in known:
                found.append(LookedAt(name, data, tokenizer, fit))
            known.add((key, fit))
    return found


def _fit(data: DataConfig, batch: BatchConfig, per_image: int, processor: BaseImageProcessor) -> Fit:
    grid = resolve_grid(data.image_grid, processor) if data.image_mode == "anyres" else []
    return Fit(batch, PackLimits.of(data, batch, per_image), tile_size(processor), tuple(grid))
