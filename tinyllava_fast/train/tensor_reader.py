"""The tensors of a checkpoint, of however many processes, as one mapping."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.tensors import SpreadTensors, TensorFile, Tensors


def open_tensors(path: Path) -> Tensors:
    """Open a safetensors file of a checkpoint, or the files of several processes (model-0.safetensors) as one.

    CheckpointError if one is missing or damaged.
    """
    files = [path] if path.is_file() else sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))
    if not files:
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete")
    opened = []
    for file in files:
        try:
            opened.append(TensorFile(file))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: truncated or damaged ({error})") from None
    return opened[0] if files == [path] else SpreadTensors(opened)
