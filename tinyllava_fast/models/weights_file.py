"""Filling a model from one safetensors file: each name and shape in it must fit, or all that differ are listed."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.models.lmm import LMM

WEIGHTS = "model.safetensors"
Shapes = dict[str, tuple[int, ...]]


def load_weights(lmm: LMM, source: str | Path, *, skip: Collection[str] = ()) -> None:
    """Copy the weights of a model folder (or .safetensors file) into the model; every name and shape must fit.

    skip: names that the caller fills.
    Raises CheckpointError listing what is missing, unexpected or of another shape.
    """
    path = Path(source) / WEIGHTS if Path(source).is_dir() else Path(source)
    _load_into(lmm, path, tied=lmm.tied_names(), skip=skip, prefix="")


def load_component(module: nn.Module, path: str | Path, component: str) -> None:
    """Fill one component from a .safetensors file, whose names may carry the component's prefix."""
    shapes = _stored_shapes(Path(path))
    prefix = f"{component}." if any(k.startswith(f"{component}.") for k in shapes) else ""
    _load_into(module, Path(path), prefix=prefix)


def _stored_shapes(path: Path) -> Shapes:
    if not path.is_file():
        raise CheckpointError(f"{path}: the weights file does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or truncated safetensors file: {error}") from None


def _load_into(
    module: nn.Module, path: Path, *, prefix: str, tied: Collection[str] = (), skip: Collection[str] = ()
) -> None:
    found = {k.removeprefix(prefix): s for k, s in _stored_shapes(path).items() if k.startswith(prefix)}
    found = {k: s for k, s in found.items() if k not in skip}
    expected = {k: tuple(v.shape) for k, v in module.state_dict().items() if k not in tied and k not in skip}
    _compare(expected, found, str(path))
    stored = load_file(path)  # its header, and with it the length of the file, has just been checked
    module.load_state_dict({k: stored[prefix + k] for k in found}, strict=False)


def _compare(expected: Shapes, found: Shapes, where: str) -> None:
    """Raise CheckpointError listing, in full, every name and shape that differs."""
    lines = [f"  missing: {k} {list(s)}" for k, s in expected.items() if k not in found]
    lines += [f"  unexpected: {k} {list(s)}" for k, s in found.items() if k not in expected]
    for key, shape in expected.items():
        if key in found and found[key] != shape:
            component, _, name = key.partition(".")
            lines.append(f"  {component}: {name} has shape {list(found[key])}, this model needs {list(shape)}")
    if lines:
        raise CheckpointError(f"{where}: the weights are of another architecture:\n" + "\n".join(lines))
