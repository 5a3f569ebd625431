"""What a result was measured on: machine, versions, and the digest of the model's files."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.hardware import cores, processor, total_memory_bytes

PACKAGES = ("tinyllava-fast", "torch", "transformers", "tokenizers", "numpy", "pillow")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, accelerator and operating system."""
    facts: dict[str, Any] = {
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": total_memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def model_digest(folder: str | Path) -> str:
    """SHA-256 over names and contents of a model folder's files, in sorted order: the same model, the same digest.

    Raises CheckpointError if there is no such folder.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder}: there is no such model folder")
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(folder).iterdir() if p.is_file()):
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
