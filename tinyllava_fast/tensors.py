"""Tensors on disk: safetensors files as a lazy mapping, and what does not fit between two sets of names and shapes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.fields import Fields, decode

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


PIECES, FILES = "pieces", "files"
"""Names in a file's metadata: JSON of {tensor: {first, rows}} for each that is some rows of a whole one, from row
``first`` on, of ``rows``; and the number of the files over which one set of tensors is spread."""


class Tensors(Mapping[str, Tensor]):
    """Tensors on disk as a mapping; each is read when it is asked for.

    path: of their file, or of the folder of their files. shapes, dtypes: of every tensor; a dtype that is not among
    ``DTYPES`` counts as bytes.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    @abstractmethod
    def rows(self, name: str, first: int, stop: int) -> Tensor:
        """Return rows ``first`` to ``stop`` - 1 of a tensor, and read no others."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files."""

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TensorFile(Tensors):
    """The tensors of one safetensors file. metadata: texts by name.

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

    def rows(self, name: str, first: int, stop: int) -> Tensor:
        """See Tensors."""
        rows: Tensor = self._file.get_slice(name)[first:stop]
        return rows

    def close(self) -> None:
        """See Tensors."""
        del self._file


class SpreadTensors(Tensors):
    """The tensors of several files, in which whole ones may lie in pieces of some rows each (``PIECES``).

    Raises CheckpointError if a file is missing, or if the pieces of a tensor do not make up a whole one.
    """

    def __init__(self, files: Sequence[TensorFile]) -> None:
        self.path, self._files = files[0].path.parent, list(files)
        if (expected := files[0].metadata.get(FILES, "1")) != str(len(files)):
            raise CheckpointError(f"{files[0].path}: is one of {expected} files, of which {len(files)} are there")
        self._pieces: dict[str, list[tuple[int, TensorFile]]] = {}
        whole: dict[str, set[tuple[torch.dtype, tuple[int, ...]]]] = {}
        for file in files:
            pieces_of = decode(file.metadata.get(PIECES, "{}"), str(file.path), CheckpointError)
            known = Fields.of(pieces_of, str(file.path), CheckpointError)
            for name, shape in file.shapes.items():
                first = 0
                if name in known.values:
                    piece = known.mapping(name)
                    first, shape = piece.integer("first", least=0), (piece.integer("rows", least=0), *shape[1:])
                self._pieces.setdefault(name, []).append((first, file))
                whole.setdefault(name, set()).add((file.dtypes[name], shape))
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece[0])
            if len(whole[name]) > 1 or not _complete(name, pieces, next(iter(whole[name]))[1]):
                raise CheckpointError(f"{self.path}: the pieces of {name!r} do not make up a whole tensor")
        self.shapes = {name: next(iter(found))[1] for name, found in whole.items()}
        self.dtypes = {name: next(iter(found))[0] for name, found in whole.items()}

    def __getitem__(self, name: str) -> Tensor:
        pieces = [file[name] for _, file in self._pieces[name]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def rows(self, name: str, first: int, stop: int) -> Tensor:
        """See Tensors."""
        found = []
        for begin, file in self._pieces[name]:
            low, high = max(first - begin, 0), min(stop - begin, file.shapes[name][0])
            if low < high:
                found.append(file.rows(name, low, high))
        if not found:
            return torch.empty((0, *self.shapes[name][1:]), dtype=self.dtypes[name])
        return found[0] if len(found) == 1 else torch.cat(found)

    def close(self) -> None:
        """See Tensors."""
        for file in self._files:
            file.close()


def _complete(name: str, pieces: Sequence[tuple[int, TensorFile]], shape: tuple[int, ...]) -> bool:
    """Return whether each row of a tensor is in one of its pieces, and in no other."""
    if not shape:
        return len(pieces) == 1
    end = 0
    for first, file in pieces:
        if first != end:
            return False
        end += file.shapes[name][0]
    return end == shape[0]


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
