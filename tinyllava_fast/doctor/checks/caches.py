"""Folders that are written to beside a run's own: that they take files, and have room."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tinyllava_fast import hardware
from tinyllava_fast.doctor.finding import CHECKS, Finding, fault, ok

ROOM = 2**30
"""Bytes that should be free: compiled graphs and kept tokens take some hundred MiB."""
_OTHERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HF_HOME")


@CHECKS.register("caches")
def caches() -> Iterator[Finding]:
    """The toolkit's cache folder, the temporary folder, and those of other libraries that are named."""
    try:
        yield from _look("the cache folder", hardware.wanted_cache_folder(), "set TLF_CACHE to a folder of yours")
    except OSError as error:
        yield fault(f"no cache folder: {error}", "set TLF_CACHE to a folder of yours")
    try:
        yield from _look("the temporary folder", Path(tempfile.gettempdir()), "set TMPDIR to a folder of yours")
    except OSError as error:  # FileNotFoundError: none is usable
        yield fault(f"no temporary folder: {error}", "set TMPDIR to a folder of yours")
    for name in _OTHERS:
        if named := os.environ.get(name):
            yield from _look(name, Path(named), f"set {name} to a folder of yours, or unset it")


def _look(what: str, folder: Path, remedy: str) -> Iterator[Finding]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        yield fault(f"{what}, {folder}, cannot be written: {error.strerror or error}", remedy)
        return
    free = free_bytes(folder)
    if free < ROOM:
        yield fault(
            f"{what}, {folder}, has {free / 2**20:.0f} MiB left", f"free some space there, or {remedy}", free=free
        )
    else:
        yield ok(f"{what}, {folder}, can be written and has {free / 2**30:.0f} GiB left", free_bytes=free)


def free_bytes(folder: Path) -> int:
    """Return the bytes that are free on the disk of a folder."""
    return shutil.disk_usage(folder).free
