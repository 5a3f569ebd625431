"""Memory of one call: the peak it adds, and what it keeps for its backward pass.

On a GPU the peak is that of torch's allocator. On a CPU it is that of the process's resident memory, because torch's
own counters see neither what C++ kernels and oneDNN allocate nor the huge pages that the ops take from numpy: the
kernel's high-water mark (VmHWM) is reset before the call and read after it. Freed memory that malloc still holds would
hide new allocations, so it is handed back to the kernel first. Not counted is what a library keeps from one call to
the next (the call has run before), and pages that are allocated but never touched, which cost nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tinyllava_fast.hardware import peak_rss_bytes, reset_peak_rss, rss_bytes

SLACK = 4 << 20
"""Bytes that the reset mark may lie above the resident memory: counters of the kernel are batched per thread."""


def peak_extra_bytes(run: Callable[[], object], device: str = "cpu") -> int | None:
    """Return the most memory in bytes that one call needs beyond what is in use before it, its results included.

    run: called once; call it before, so that what happens only once is done, and collect garbage. None where the
    operating system does not let the mark be reset. Resolution on a CPU: pages of 4 KiB, of 2 MiB where the kernel
    gives huge ones.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _return_freed_memory()
    reset_peak_rss()
    before = rss_bytes()
    if peak_rss_bytes() > before + SLACK:
        return None
    result = run()
    peak = peak_rss_bytes()
    del result
    return max(0, peak - before)


@contextlib.contextmanager
def saved(*existing: Tensor) -> Iterator[dict[int, int]]:
    """Yield what calls inside the block keep for their backward pass: {address: bytes} of storages.

    existing: inputs and weights, which are there anyway and don't count. A storage counts once and whole, however small
    a view of it is saved.
    """
    known = {t.untyped_storage().data_ptr() for t in existing}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _return_freed_memory() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return
