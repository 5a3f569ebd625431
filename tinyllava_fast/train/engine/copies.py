"""Packs on their way to a GPU, beside what it computes.

The host is ahead of the GPU: when it asks for a copy, the step before is still being computed. On a stream of its own
the copy, from pinned memory, does not wait for that.
"""

from __future__ import annotations

import functools

import torch

from tinyllava_fast.data.types import PackedBatch


def to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """Return the pack on the device, normalized; what is launched from now on waits for it, the host does not."""
    if device.type != "cuda":
        return batch.to(device)
    beside, current = _stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(beside):
        moved = batch.to(device)
    current.wait_stream(beside)
    for tensor in moved.tensors().values():
        tensor.record_stream(current)  # else its memory could be given to a copy while it is being read
    return moved


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
