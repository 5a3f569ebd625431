"""The only importer of the C++ extension."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch  # before _C: the extension then shares the OpenMP pool of the libgomp that torch carries
from torch import Tensor

from tinyllava_fast.hardware import keeps_memory

ABI = 6
"""Raise it when a kernel's signature changes: CMake builds this number into the extension, and load() compares."""
ISAS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
_kept = threading.local()
_ALIGN = 64  # bytes: one cache line, one AVX-512 register
_LARGE = 4 << 20  # bytes from which numpy asks for huge pages
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """Return the extension, or None with the reason and the remedy."""
    try:
        from tinyllava_fast import _C  # type: ignore[attr-defined]  # made by CMake
    except ImportError as error:
        return None, f"the C++ extension does not load ({error}); run `make setup` or `pip install -e .`"
    built = getattr(_C, "ABI", None)
    if built != ABI:
        return None, f"the C++ extension was built for ABI {built}, this package needs {ABI}; run `make setup`"
    return _C, ""


def extension() -> ModuleType:
    """Return the extension, ready for one call; raise RuntimeError with the remedy if it is not there.

    Built by clang it has an OpenMP runtime of its own, which is told torch's number of threads here: buffers are sized
    by that number.
    """
    module, reason = load()
    if module is None:
        raise RuntimeError(reason)
    if (set_threads := _set_threads()) is not None:
        set_threads(torch.get_num_threads())
    return module


@functools.cache
def _set_threads() -> Callable[[int], None] | None:
    return getattr(load()[0], "set_threads", None)


@torch.compiler.assume_constant_result
def isa() -> str:
    """Return the one of ISAS that the kernels run on, or "" without the extension."""
    return _isa()


@functools.cache
def _isa() -> str:
    module = load()[0]
    return "" if module is None else module.isa()


def has_tiles() -> bool:
    """Return whether the kernels run on AMX tiles."""
    return isa() == "amx"


def runs(*dtypes: torch.dtype, kernel: str = "C++") -> Callable[..., str | None]:
    """Return a ``cpp_supports`` or ``triton_supports`` for kernels of some dtypes: those of the first float tensor."""

    def supports(*args: object) -> str | None:
        dtype = next(a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point())
        return None if dtype in dtypes else f"its {kernel} kernel takes {' or '.join(map(str, dtypes))}, got {dtype}"

    return supports


def unit_stride(tensor: Tensor) -> Tensor:
    """Return the matrix itself if the elements of a row are adjacent, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def row_bytes(tensor: Tensor) -> int:
    """Return the bytes from one row of a matrix to the next."""
    return tensor.stride(0) * tensor.element_size()


def row_scratch(columns: int) -> Tensor:
    """Return the float32 buffer in which kernels of a few rows lay out x. The next call reuses it."""
    return scratch(64 * (columns + 128)).view(torch.float32)


def scratch(nbytes: int, owner: str = "buffer") -> Tensor:
    """Return the first bytes of the buffer that this thread keeps. The next call with the same owner reuses them.

    It grows to the largest request. Fresh memory costs more than filling it. owner: an op that calls others while it
    needs its scratch has a buffer of its own.
    """
    kept: Tensor | None = getattr(_kept, owner, None)
    if kept is None or kept.numel() < nbytes:
        with torch.inference_mode(False):  # or it could not be written to by torch outside of that mode
            kept = empty(nbytes, dtype=torch.uint8)
        setattr(_kept, owner, kept)
    return kept[:nbytes]


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return torch.empty on the CPU, in huge pages if it is large.

    Page faults cost more than the work on a fresh gradient of 50 MB: 26 ms against 8 ms for zero filling it
    (2-core EPYC; docs/LOG.md). numpy asks the kernel for huge pages, torch only where hardware.prepare_memory told it
    to; there its own allocator finds the memory of other tensors again.
    """
    if keeps_memory():
        return torch.empty(shape, dtype=dtype)
    return _buffer(np.empty, torch.empty, shape, dtype)


def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return torch.zeros on the CPU; pages of a large one are zeroed by the kernel when first touched, or never."""
    return _buffer(np.zeros, torch.zeros, shape, dtype)


def _buffer(
    allocate: Callable[..., np.ndarray], small: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LARGE:
        return small(shape, dtype=dtype)
    raw = allocate(nbytes + _ALIGN, np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return torch.from_numpy(raw[start : start + nbytes]).view(dtype).view(shape)
