"""Tensors into a safetensors file, one at a time."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tinyllava_fast.errors import UserError, writing
from tinyllava_fast.tensors import DTYPES, PIECES
from tinyllava_fast.train.checksums import Checksum
from tinyllava_fast.train.engine.base import LazyTensor

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 1 << 24  # written, then summed while it is in the processor's cache


def write_tensors(path: Path, items: Sequence[LazyTensor], *, metadata: Mapping[str, str] | None = None) -> Checksum:
    """Stream this process's tensors into a safetensors file, fsync it and return its checksum.

    One of them is in memory at a time: the library's save_file takes all at once, which a gathered state of a large
    model does not allow. All are fetched, also after a failure, because other processes wait in the same gathers; then
    UserError.
    """
    head = _header([item for item in items if item.mine], metadata or {})
    left = list(reversed(items))
    try:
        with writing(path), path.open("wb") as file:
            file.write(head)
            total = Checksum().plus(head)
            while left:
                item = left.pop()
                tensor = item.fetch()
                if not item.mine:
                    continue
                content = _bytes_of(tensor)
                for start in range(0, content.nbytes, _CHUNK):
                    chunk = content[start : start + _CHUNK]
                    file.write(chunk)
                    total = total.plus(chunk)
            file.flush()
            os.fsync(file.fileno())
    except UserError:
        for item in reversed(left):
            item.fetch()
        raise
    return total


def _header(items: Sequence[LazyTensor], metadata: Mapping[str, str]) -> bytes:
    """Return the beginning of the file: the length of the table of tensors, and the table."""
    header: dict[str, object] = {}
    pieces = {item.name: {"first": item.first, "rows": item.rows} for item in items if item.rows is not None}
    if texts := {**metadata, **({PIECES: json.dumps(pieces)} if pieces else {})}:
        header["__metadata__"] = texts
    end = 0
    for item in items:
        size = item.dtype.itemsize * int(torch.Size(item.shape).numel())
        shape = list(item.shape)
        header[item.name] = {"dtype": _DTYPE_NAMES[item.dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes_of(tensor: Tensor) -> memoryview:
    content: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return content
