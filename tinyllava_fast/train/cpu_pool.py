"""A pool for the CPU tensors of a training process: built once per torch, kept in the user's cache folder.

See cpu_pool.cpp for what it does and why glibc's heap cannot. Without a C++ compiler, or outside Linux, torch's own
allocator stays, with the settings of hardware.prepare_memory.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.files import atomic_file
from tinyllava_fast.hardware import cache_folder, total_memory_bytes
from tinyllava_fast.log import log

SWITCH = "TLF_CPU_ALLOCATOR"
KINDS = ("pool", "torch")
_SOURCE = Path(__file__).with_suffix(".cpp")
_PATIENCE = 300  # seconds for a compiler that takes about five


@dataclass(frozen=True)
class PoolStats:
    """Bytes of tensors of 64 KiB and more."""

    used: int
    peak: int


def install() -> bool:
    """Give torch the pool for all CPU tensors from here on, and return whether this process has it.

    TLF_CPU_ALLOCATOR=torch keeps torch's own. Raises UserError for another value of it.
    """
    return wanted() and _library() is not None


def wanted() -> bool:
    """Return whether TLF_CPU_ALLOCATOR lets the pool be. Raises UserError for a value of it that is not known."""
    kind = os.environ.get(SWITCH, KINDS[0])
    if kind not in KINDS:
        raise UserError(f"{SWITCH}: {kind!r}; {nearest(kind, KINDS)}")
    return kind == "pool"


def compiler() -> list[str]:
    """Return the C++ compiler's command. CXX may hold arguments too ("ccache g++")."""
    return shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or "g++"]


def stats(*, reset: bool = False) -> PoolStats | None:
    """Return the bytes that the pool holds; None without it. reset: let the peak count from here."""
    library = _library() if _library.cache_info().currsize else None
    if library is None:
        return None
    out = (ctypes.c_size_t * 2)()
    library.tlf_pool_stats(out, int(reset))
    return PoolStats(*out)


def trim() -> None:
    """Give the pages of freed tensors back: building a model in float32 needs more than the steps that follow."""
    if _library.cache_info().currsize and (library := _library()) is not None:
        library.tlf_pool_trim()


@functools.cache
def _library() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    try:
        library = _load()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        detail = next((line for line in said if "error" in line.lower()), said[0] if said else repr(error))
        log.warning(
            "CPU tensors stay with torch's allocator, slower and larger: the pool does not build (%s). Install a C++ "
            "compiler or name one with CXX; %s=torch is silent",
            detail,
            SWITCH,
        )
        return None
    library.tlf_pool_install.argtypes = [ctypes.c_size_t]
    # Addresses alone: twice the memory, so that holes never end the range before the memory does.
    if library.tlf_pool_install(2 * total_memory_bytes()):
        return library
    log.warning(
        "CPU tensors stay with torch's allocator: the kernel grants no addresses (ulimit -v, overcommit_memory)"
    )
    return None


def _load() -> ctypes.CDLL:
    """The library; built anew where the kept one does not load: cut short, or of a machine with another C library."""
    try:
        return ctypes.CDLL(str(_build()))
    except OSError:
        return ctypes.CDLL(str(_build(anew=True)))


def _build(*, anew: bool = False) -> Path:
    """The shared library for this torch; compiled if it is not in the cache. Concurrent builds do no harm.

    anew: whatever is in the cache.
    """
    root = Path(torch.__file__).parent
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    text = _SOURCE.read_bytes() + f"{torch.__version__} {abi}".encode()
    target = cache_folder() / f"cpu_pool-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if target.is_file() and not anew:
        return target
    # Synced: half a library that a power cut leaves would crash whoever loads it.
    with atomic_file(target) as built:
        flags = ["-O2", "-std=c++20", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
        command = [*compiler(), *flags, f"-I{root / 'include'}", str(_SOURCE), "-o", str(built)]
        command += [f"-L{root / 'lib'}", "-lc10"]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=_PATIENCE)
    return target
