"""A workload's model on disk, for benchmarks whose sides open a model folder."""

from __future__ import annotations

from pathlib import Path

import torch

from tinyllava_fast.config.schema import RunConfig
from tinyllava_fast.models.build import build_image_processor, build_model, build_tokenizer
from tinyllava_fast.models.io import save_model


def write_model(run: RunConfig, folder: Path, dtype: torch.dtype) -> Path:
    """Write the model of a run that has not trained, with weights of ``dtype``, and return its folder."""
    lmm = build_model(run.model, seed=run.seed).eval().to(dtype)
    data = run.stages[-1].data  # the first one's template may leave the questions out
    lmm.describe_training(
        template=data.template,
        turns=data.turns,
        image_mode=data.image_mode,
        image_grid=data.image_grid,
        reading=lmm.config.reading,
    )
    return save_model(lmm, build_tokenizer(run.model), build_image_processor(run.model), folder)
