"""The weights of a stage's model folder, from those of the model and of the optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinyllava_fast.models import adapter
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.recipes import quantize
from tinyllava_fast.train.engine.base import LazyTensor
from tinyllava_fast.train.optim import MEAN

MASTER = "master/"


def output_weights(
    model: LMM,
    weights: Sequence[LazyTensor],
    optimizer: Sequence[LazyTensor],
    *,
    means: bool,
    following: bool,
    dtype: torch.dtype,
    main: bool = True,
) -> dict[str, Tensor]:
    """Return the weights that a stage's model folder is written from, under the names of the model; {} if not main.

    weights, optimizer: as the engine's ``model_state`` and ``optimizer_state``; means: whether the latter keeps running
    means, which ``weights`` then are. following: whether another stage begins from the folder. dtype: of the training.
    Every rank calls it, and only the main one holds the whole model.
    """
    items = [(item.name, item) for item in weights]
    kept = MEAN if means else MASTER
    # The next stage begins from the optimizer's float32 masters, not from weights rounded to the training dtype. An
    # adapter is saved from its masters too, so that merging it loses nothing.
    exact = {name for name, _ in items} if following else set(adapter.parameter_names(model))
    for item in optimizer:
        name = item.name.removeprefix(kept)
        if name != item.name and name in exact:
            items.append((name, item))
    found: dict[str, Tensor] = {}
    for name, item in items:
        tensor = item.fetch()  # all take part
        if main:
            found[name] = tensor.cpu()
    if main:
        found = quantize.plain_weights(model, found, dtype)
        if following:
            found = {name: tensor.float() for name, tensor in found.items()}
    return found
