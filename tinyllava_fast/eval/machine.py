"""The conditions of a measurement: machine, versions, and the digest of the model's files."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.eval.files import is_folder
from tinyllava_fast.eval.types import Machine
from tinyllava_fast.files import TMP
from tinyllava_fast.hardware import cores, processor, total_memory_bytes

PACKAGES = ("tinyllava-fast", "torch", "transformers", "tokenizers", "numpy", "pillow")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
OUTPUTS = ("results.json", "report.html")
PLACES = re.compile(r"(?!_).*name_or_path2?|mm_vision_tower")
"""Fields of a config that say where a part of the model lies. _name_or_path only says where it came from."""


def machine() -> Machine:
    """Return processor, cores, memory, accelerator and operating system."""
    facts: Machine = {
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
    """Return the versions of the packages that a result depends on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def model_digest(folder: str | Path, besides: str | Path | None = None, adapter: str | Path | None = None) -> str:
    """SHA-256 over names and contents of a model folder's files, in sorted order: the same model, the same digest.

    Files: those in the folder, and in the folders in it that hold weights (an adapter, the parts of a checkpoint that
    is stored in parts). Of folders elsewhere that the configs name (a tower, a base model) the sizes and times count.
    besides: results that an evaluation writes into this folder do not count. adapter: a folder that counts like it.
    Raises CheckpointError if there is no such folder, or a file of it cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise CheckpointError(f"{folder}: there is no such model folder")
    inside = besides is not None and root.resolve() == Path(besides).resolve()
    digest = hashlib.sha256()
    try:
        for file in _files_of(root):
            name = file.relative_to(root).as_posix()
            if not (inside and (name in OUTPUTS or name.startswith(TMP))):
                digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
                _add_content(digest, file)
        for file in _named_elsewhere(root):
            status = file.stat()
            digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None
    if adapter is not None:
        digest.update(model_digest(adapter).encode())
    return digest.hexdigest()


def plugins_digest(names: Iterable[str]) -> str:
    """Sixteen digits over the code of plugins, named as load_plugins takes them; of a package its own modules."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        found = None if name.endswith(".py") else find_spec(name)
        file = Path(found.origin) if found is not None and found.origin else Path(name)
        modules = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
        for module in modules:
            if module.is_file():
                _add_content(digest, module)
    return digest.hexdigest()[:16]


def _files_of(root: Path) -> list[Path]:
    """Return the files of a folder and of the folders in it that hold weights."""
    files = sorted(p for p in root.iterdir() if p.is_file())
    for part in sorted(p for p in root.iterdir() if p.is_dir()):
        inner = sorted(p for p in part.iterdir() if p.is_file())
        files += inner if any(p.suffix in WEIGHTS for p in inner) else []
    return files


def _named_elsewhere(root: Path) -> list[Path]:
    """Return the files of the folders that a model's configs name as places of its parts, and so on for those parts."""
    seen, new, files = {root.resolve()}, [root], []
    while new:
        for place in sorted({path for name in _names_in(new.pop()) if is_folder(path := Path(name))}):
            if place.resolve() not in seen:
                seen.add(place.resolve())
                new.append(place)
                files += _files_of(place)
    return files


def _names_in(folder: Path) -> Iterator[str]:
    """Yield the places of parts that the configs of a folder name, at any depth."""
    for config in ("config.json", "adapter_config.json"):
        try:
            values = [json.loads((folder / config).read_text(encoding="utf-8"))]
        except (OSError, ValueError, RecursionError):
            continue  # what is wrong with it is said when the model is opened
        while values:
            value = values.pop()
            values += value if isinstance(value, list) else value.values() if isinstance(value, dict) else []
            if isinstance(value, dict):
                given = (str(name) for key, name in value.items() if PLACES.fullmatch(key) and name)
                yield from (part for name in given for part in {name, name.rpartition(":")[2]})  # mof:FOLDER


def _add_content(digest: hashlib._Hash, file: Path) -> None:
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
