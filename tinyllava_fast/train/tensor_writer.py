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
from tinyllava_fast.tensors import DTYPES
from tinyllava_fast.train.checksums import Checksum
from tinyllava_fast.train.engine.base import LazyTensor

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def fetch_all(items: Sequence[LazyTensor]) -> None:
    """Take part in the gathers of a file that another process writes."""
    for item in items:
        item.fetch()


def write_tensors(path: Path, items: Sequence[LazyTensor], *, metadata: Mapping[str, str] | None = None) -> Checksum:
    """Stream tensors into a safetensors file, fsync it and return its checksum; one of them is in memory at a time.

    The library's save_file takes all of them at once, which a gathered state of a large model does not allow. After a
    failure the fetches go on, because other processes wait in the same gathers; then UserError.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for item in items:
        size = item.dtype.itemsize * int(torch.Size(item.shape).numel())
        shape = list(item.shape)
        header[item.name] = {"dtype": _DTYPE_NAMES[item.dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    left = list(reversed(items))
    try:
        with writing(path), path.open("wb") as file:
            head = struct.pack("<Q", len(text)) + text
            file.write(head)
            total = Checksum().plus(head)
            while left:
                content = _bytes_of(left.pop().fetch())
                file.write(content)
                total = total.plus(content)
            file.flush()
            os.fsync(file.fileno())
    except UserError:
        fetch_all(list(reversed(left)))
        raise
    return total


def _bytes_of(tensor: Tensor) -> memoryview:
    content: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return content
