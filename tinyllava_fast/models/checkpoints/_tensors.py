"""Tensors of a checkpoint, named and shaped but not read: safetensors or torch files, whole or in shards.

A torch file is a pickle. It is opened with ``weights_only=True``, which executes nothing, and refused if it needs more.
"""

from __future__ import annotations

import functools
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.fields import Fields, read_json
from tinyllava_fast.log import log
from tinyllava_fast.tensors import open_weights

# Tried in this order inside a folder.
NAMES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


@dataclass(frozen=True)
class Stored:
    """One tensor in a file. ``read`` gets it; ``key`` is its name in that file."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Stored, ...]:
        """Return equal parts, as Tensor.chunk does, still unread."""
        size = self.shape[dim] // chunks
        shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])

        def part(number: int) -> Callable[[], Tensor]:
            return lambda: self.read().narrow(dim, number * size, size)

        return tuple(replace(self, shape=shape, read=part(number)) for number in range(chunks))

    @classmethod
    def of(cls, key: str, tensor: Tensor) -> Stored:
        """Return a tensor that is in memory already."""
        return cls(key, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def holds_weights(folder: Path) -> bool:
    """Return whether ``read_tensors`` finds files in the folder."""
    return any((folder / name).is_file() for name in NAMES)


def read_tensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a file, or of the weights in a folder, by name. Only headers are read.

    Raises CheckpointError for a file that is missing, damaged, truncated, or a pickle that holds code.
    """
    if path.is_dir():
        path = _weights_file(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: the weights file does not exist")
    if path.name.endswith(".index.json"):
        return _sharded(path)
    return _safetensors(path) if path.suffix == ".safetensors" else _torch(path)


def _weights_file(folder: Path) -> Path:
    """The file to read in a folder. An index that an earlier, larger model left beside a whole file is passed over.

    Raises CheckpointError where both are complete: nothing tells which of the two models is meant.
    """
    found = next((folder / name for name in NAMES if (folder / name).is_file()), folder / NAMES[1])
    whole = folder / found.name.removesuffix(".index.json")
    if whole == found or not whole.is_file():
        return found
    shards = sorted(set(_weight_map(found).values()))
    if all((folder / name).is_file() for name in shards):
        raise CheckpointError(
            f"{folder}: holds two models, {whole.name} and the shards of {found.name}; remove the one that is not meant"
        )
    log.warning("%s: the shards that it names are not there; reading %s", found, whole.name)
    return whole


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor names and the files that hold them, all in the folder of the index."""
    values = read_json(index, CheckpointError)
    if not isinstance(values, dict) or not isinstance(values.get("weight_map"), dict):
        raise CheckpointError(f"{index}: not an index of shards: it has no JSON object weight_map")
    mapping = Fields(values["weight_map"], f"{index}: weight_map", CheckpointError)
    for key in mapping.values:
        name = mapping.text(key)
        if Path(name).name != name or name in ("..", "."):
            raise CheckpointError(f"{index}: names a shard outside its folder: {name!r}")
        if name.endswith(".index.json"):
            mapping.fail(key, "a file of weights", name)
    return dict(mapping.values)


def _sharded(index: Path) -> dict[str, Stored]:
    mapping = _weight_map(index)
    found: dict[str, Stored] = {}
    for name in sorted(set(mapping.values())):
        tensors = read_tensors(index.parent / name)
        if twice := sorted(found.keys() & tensors.keys()):
            raise CheckpointError(
                f"{index}: {twice[0]} stands in {name} and in another shard; save the model again, so that it has one"
            )
        found |= tensors
    lost = sorted(set(mapping) - set(found))
    if lost:
        raise CheckpointError(f"{index}: in none of its shards: {', '.join(lost)}")
    return found


def _safetensors(path: Path) -> dict[str, Stored]:
    file = open_weights(path)
    return {
        key: Stored(key, shape, file.dtypes[key], functools.partial(file.__getitem__, key))
        for key, shape in file.shapes.items()
    }


def _torch(path: Path) -> dict[str, Stored]:
    mapped = zipfile.is_zipfile(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError as error:
        code = sorted(set(re.findall(r"GLOBAL ([\w.]+)", str(error))))
        if code:
            raise CheckpointError(
                f"{path}: this pickle holds code or objects, not only tensors ({', '.join(code)}); it was not loaded. "
                "Save its tensors as safetensors where you trust it"
            ) from None
        raise CheckpointError(f"{path}: damaged, or no torch file: {_first_line(error)}") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged or truncated torch file: {_first_line(error)}") from None
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, expected names and tensors")
    others = [f"{key} ({type(v).__name__})" for key, v in loaded.items() if not isinstance(v, Tensor)]
    if others:
        raise CheckpointError(f"{path}: holds more than tensors: {', '.join(others)}")
    return {key: Stored.of(key, tensor) for key, tensor in loaded.items()}


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
