"""The machine and this process on it: what it is, memory in use, and settings that make large CPU tensors cheap.

About the settings: a training step allocates and frees the same large activations again and again. glibc maps each
of them afresh and gives it back, so every step pays a page fault per 4 KiB. Keeping freed memory in the heap and
backing it with 2 MiB pages took a step of a 20 M parameter model from 37,000-48,000 faults to about 1,000, at the same
peak memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import stat
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
# (M, K, N): a large square, and a decoder's own widths (SmolLM2-135M: 3072 tokens through up and down)
GEMM_SHAPES = ((2048, 2048, 2048), (3072, 576, 1536), (3072, 1536, 576))
CUDA_GEMM_SHAPES = ((8192, 8192, 8192), (16384, 4096, 4096))
_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
_NEVER = 2**31 - 1  # mallopt takes an int
_OLD_LIMIT = 32 * 2**20  # the largest mmap threshold that older glibc accepts
PASS_BLOCK = 4 * 2**20  # blocks above are of passes over some thousand tokens; a step of decoding has smaller ones
LOADING_BLOCK = 2**17  # nearly all weights are larger
# Of oneDNN and of torch beside it, read at their first product; 1024 each by default. A prepared product of one number
# of rows takes 0.6 MB in both together. Two passes need no more: a layer has about four, tower and connector as many.
_PREPARED_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
_CACHE_VARIABLES = ("TLF_CACHE", "XDG_CACHE_HOME", "HOME")
_memory = {"kept": False}  # what prepare_memory has set up


def torchrun_number(name: str, default: int) -> int:
    """Return a number that torchrun sets in the environment. UserError if something else has set it to no number."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(
            f"environment variable {name}: expected a whole number, got {text!r}; unset it, or use torchrun"
        )
    return int(text)


def own_gpu(local_rank: int) -> int:
    """Return the index of the GPU of a node's process. UserError if it sees fewer GPUs than that takes.

    A process that sees one GPU has it by itself, as under srun --gpus-per-task=1; but torchrun's all see the same.
    """
    import torch

    count = torch.cuda.device_count()
    if local_rank < count:
        return local_rank
    if count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0
    raise UserError(
        f"LOCAL_RANK is {local_rank}, but this process sees {count} GPUs; start at most {count} processes on this "
        "machine, or let each see one GPU of its own (srun --gpus-per-task=1)"
    )


def prepare_memory() -> bool:
    """Keep freed memory and ask for huge pages; False where the C library is not glibc.

    Call it before torch allocates: torch reads THP_MEM_ALLOC_ENABLE once. A value that the user has set stays.
    """
    _memory["kept"] = os.environ.setdefault(_HUGE_PAGES, "1") == "1"
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    kept = mallopt(M_MMAP_THRESHOLD, _NEVER) or mallopt(M_MMAP_THRESHOLD, _OLD_LIMIT)
    return bool(kept and mallopt(M_TRIM_THRESHOLD, _NEVER))


def keeps_memory() -> bool:
    """Return whether prepare_memory has told this process to find freed memory again, so that little is fresh."""
    return _memory["kept"]


def bound_memory(block: int = PASS_BLOCK) -> bool:
    """Let all threads share one heap, and give blocks of so many bytes back once they are free; False without glibc.

    For servers. By itself glibc gives each thread a heap, which keeps the most that the thread ever held, and keeps
    blocks of up to 32 MiB: memory then grows whenever some thread meets a larger pass than before, for hours.
    And oneDNN keeps what it prepares for a product by the number of rows, which is another one in nearly every pass:
    few of them are kept, unless the user has set how many.
    Call it before threads are started and before torch multiplies.
    """
    for name, value in _PREPARED_PRODUCTS.items():
        os.environ.setdefault(name, value)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {M_ARENA_MAX: 1, M_MMAP_THRESHOLD: block, M_TRIM_THRESHOLD: 2 * PASS_BLOCK}
    return all(mallopt(name, value) for name, value in settings.items())


def release_memory() -> None:
    """Give the free pages of the heap back to the system."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def gemm_flops_per_s(dtype: torch.dtype, device: str = "cpu") -> float:
    """Return the peak that MFU divides by: the best of ``gemm_rates``."""
    return max(gemm_rates(dtype, device).values())


def gemm_rates(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    rounds: int = 7,
    min_seconds: float = 0.1,
) -> dict[str, float]:
    """Return {"MxKxN": FLOP/s} of torch's product of [M, K] and the transpose of [N, K], as in a linear layer.

    Measured, not read from a data sheet: a peak must be what torch reaches here today. shapes: (M, K, N); by default a
    large square and a small decoder's widths. min_seconds: a round repeats the product about so long; the rate is the
    median round's.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    rates = {}
    for m, k, n in shapes or (CUDA_GEMM_SHAPES if device.startswith("cuda") else GEMM_SHAPES):
        left, right = (torch.randn(r, k, generator=generator).to(device, dtype) for r in (m, n))
        out = torch.empty(m, n, device=device, dtype=dtype)

        def seconds(
            calls: int, left: torch.Tensor = left, right: torch.Tensor = right, out: torch.Tensor = out
        ) -> float:
            started = time.perf_counter()
            for _ in range(calls):
                torch.mm(left, right.t(), out=out)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            return (time.perf_counter() - started) / calls

        once = min(seconds(1), seconds(1))
        calls = max(1, round(min_seconds / once))
        rates[f"{m}x{k}x{n}"] = 2 * m * k * n / statistics.median(seconds(calls) for _ in range(rounds))
    return rates


def cache_folder() -> Path:
    """Return a folder that can be written to, for files that outlive a run and can be made again.

    TLF_CACHE, else tinyllava_fast in XDG_CACHE_HOME or in .cache of the user's home. Where that cannot be written, or
    the user has no home (a container's user without a passwd entry): a private one among the temporary files, and a
    warning the first time.
    """
    return _writable_cache(*(os.environ.get(name, "") for name in _CACHE_VARIABLES))


def wanted_cache_folder() -> Path:
    """Return the cache folder that the environment names, writable or not. Raise OSError where the user has no home."""
    return _named_cache(*(os.environ.get(name, "") for name in _CACHE_VARIABLES))


def _named_cache(named: str, xdg: str, home: str) -> Path:
    return Path(named).absolute() if named else _user_cache(xdg, home) / "tinyllava_fast"


@functools.cache
def _writable_cache(named: str, xdg: str, home: str) -> Path:
    try:
        folder = _named_cache(named, xdg, home)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        reason, other = error, _temporary_cache()
    log.warning("no cache folder of this user can be written (%s); using %s. TLF_CACHE names another", reason, other)
    return other


def _user_cache(xdg: str, home: str) -> Path:
    """Return the XDG standard's folder; it says to ignore a relative path. Raise OSError without a home."""
    if os.path.isabs(xdg):
        return Path(xdg)
    if not os.path.isabs(home):
        try:
            import pwd

            home = pwd.getpwuid(os.getuid()).pw_dir
        except (ImportError, KeyError):
            raise OSError("HOME is not set, and the system knows no home of this user") from None
    return Path(home) / ".cache"


def _temporary_cache() -> Path:
    """Return the same folder in every process of this user, unless another user has put something in its place.

    Shared libraries are loaded from it, so nobody else may write to it. Where nothing at all can be written, a path at
    which every attempt is an OSError.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    try:
        folder = Path(tempfile.gettempdir()) / f"tinyllava_fast-{user}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o077:
            return folder
        return Path(tempfile.mkdtemp(prefix="tinyllava_fast-"))
    except OSError:
        return Path(os.devnull) / "tinyllava_fast"


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux: platform knows something
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory_bytes() -> int:
    """Memory that a process could take now without swapping; all of the machine's where the kernel does not say."""
    found = _bytes_in("/proc/meminfo", "MemAvailable")
    return total_memory_bytes() if found is None else found


def rss_bytes() -> int:
    """Resident memory of this process."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return peak_rss_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int:
    """Largest resident memory of this process since it began or since ``reset_peak_rss``."""
    found = _bytes_in("/proc/self/status", "VmHWM")
    if found is not None:
        return found
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _bytes_in(file: str, name: str) -> int | None:
    """A line "name: 123 kB" of one of the kernel's files; None where there is none."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def reset_peak_rss() -> None:
    """Let the peak count from the present size, where the kernel offers that; else it stays that of the whole life."""
    try:
        Path("/proc/self/clear_refs").write_bytes(b"5")
    except OSError:
        return
