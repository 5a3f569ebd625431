"""Filling a model from one safetensors file: each name and shape in it must fit, or all that differ are listed."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import nn

from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.tensors import Tensors, mismatches, open_weights

WEIGHTS = "model.safetensors"


def load_weights(lmm: LMM, source: str | Path | Tensors, *, skip: Collection[str] = ()) -> None:
    """Copy the weights of a model folder (or .safetensors file) into the model; every name and shape must fit.

    source: may also be the tensors, opened. skip: names that the caller fills.
    Raises CheckpointError listing what is missing, unexpected or of another shape.
    """
    if not isinstance(source, Tensors):
        source = open_weights(Path(source) / WEIGHTS if Path(source).is_dir() else Path(source))
    _load_into(lmm, source, tied=lmm.tied_names(), skip=skip, prefix="")


def load_component(module: nn.Module, path: str | Path, component: str) -> None:
    """Fill one component from a .safetensors file, whose names may carry the component's prefix."""
    file = open_weights(Path(path))
    prefix = f"{component}." if any(k.startswith(f"{component}.") for k in file) else ""
    _load_into(module, file, prefix=prefix)


def _load_into(
    module: nn.Module, file: Tensors, *, prefix: str, tied: Collection[str] = (), skip: Collection[str] = ()
) -> None:
    found = {k.removeprefix(prefix): s for k, s in file.shapes.items() if k.startswith(prefix)}
    found = {k: s for k, s in found.items() if k not in skip}
    expected = {k: tuple(v.shape) for k, v in module.state_dict().items() if k not in tied and k not in skip}
    if lines := mismatches(expected, found):
        raise CheckpointError(f"{file.path}: the weights are of another architecture:\n" + "\n".join(lines))
    module.load_state_dict({k: file[prefix + k] for k in found}, strict=False)
