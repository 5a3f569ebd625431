"""Random state of a process: set from one seed, saved and restored as plain tensors and JSON."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

PlainState = dict[str, dict[str, Any]]
"""The settings of python's and numpy's generators, without their words."""


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed python, numpy and torch (all devices). Ranks differ, so that dropout does; weights take the seed itself."""
    mixed = (seed * 1_000_003 + rank) % 2**32
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def rng_state() -> tuple[PlainState, dict[str, Tensor]]:
    """Return the JSON part and the tensor part (uint8 and int64) of python's, numpy's and torch's generators."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    plain: PlainState = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {"name": name, "position": int(position), "has_gauss": int(has_gauss), "cached": float(cached)},
    }
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return plain, tensors


def set_rng_state(plain: PlainState, tensors: dict[str, Tensor]) -> None:
    """Restore what ``rng_state`` returned. A CUDA state is ignored where there is no CUDA."""
    python = plain["python"]
    random.setstate((python["version"], tuple(tensors["python"].tolist()), python["gauss"]))
    state = plain["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((state["name"], keys, state["position"], state["has_gauss"], state["cached"]))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
