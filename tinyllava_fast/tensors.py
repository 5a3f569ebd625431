"""Tensors on disk: a safetensors file as a lazy mapping, and what does not fit between two sets of names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinyllava_fast.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the names that safetensors has for them."""


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping whose tensors are read when asked for.

    shapes, dtypes: of every tensor; a dtype that is not among ``DTYPES`` counts as bytes. metadata: texts by name.
    Opening it reads the header and checks it and the file's length: OSError or SafetensorError where it is missing,
    truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = safe_open(str(path), framework="pt")
        headers = {name: self._file.get_slice(name) for name in self._file.keys()}
        self.shapes = {name: tuple(header.get_shape()) for name, header in headers.items()}
        self.dtypes = {name: DTYPES.get(header.get_dtype(), torch.uint8) for name, header in headers.items()}
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        del self._file


def open_weights(path: Path) -> TensorFile:
    """Open a model's weights. Raises CheckpointError if the file is missing, truncated or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path}: the weights file does not exist")
    try:
        return TensorFile(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or truncated safetensors file: {error}") from None


def mismatches(
    expected: Mapping[str, Sequence[int] | None],
    found: Mapping[str, Sequence[int] | None],
    *,
    needs: str = "this model needs",
    stored_as: Mapping[str, str] | None = None,
) -> list[str]:
    """Return a line for every name that is missing, unexpected or of another shape: none if all fit.

    expected, found: names and shapes; None: only the name counts. needs: who asks for an expected shape.
    stored_as: what the names in ``found`` are called in their file, if they are called otherwise.
    """
    keys = stored_as or {}
    lines = [f"  missing: {name}{_shown(shape)}" for name, shape in expected.items() if name not in found]
    surplus = {name: shape for name, shape in found.items() if name not in expected}
    lines += [f"  unexpected: {keys.get(name, name)}{_shown(shape)}" for name, shape in surplus.items()]
    for name, shape in expected.items():
        if name in found and found[name] != shape:
            component, _, rest = name.partition(".")
            there = f" (stored as {keys[name]})" if name in keys else ""
            lines.append(f"  {component}: {rest}{there} has shape{_shown(found[name])}, {needs}{_shown(shape)}")
    return lines


def _shown(shape: Sequence[int] | None) -> str:
    return "" if shape is None else f" {list(shape)}"
