"""Checkpoint layouts of other projects, and the registry of those that can be opened.

A layout is one file in this folder. It recognizes a folder by what is in it (the keys of config.json, file names,
tensor names), never by its path, and describes the model: architecture, and for each tensor where it is stored.
Nothing a folder holds is executed: code files beside the weights are ignored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.fields import Fields, read_json
from tinyllava_fast.models.architecture import LMMConfig, Values
from tinyllava_fast.models.checkpoints._tensors import Stored, read_tensors
from tinyllava_fast.registry import Registry

if TYPE_CHECKING:
    from tinyllava_fast.models.checkpoints._lora import Lora


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Folders or hub ids of what a checkpoint names but does not hold. None: the name that the checkpoint gives."""

    llm: str | None = None
    """Language model or checkpoint that a folder with only a projector or adapter was trained on."""
    vision: str | None = None
    """Vision tower: its config, and its weights where the checkpoint has none."""
    vision2: str | None = None
    """The second tower of a mixture of features."""


class Folder:
    """A checkpoint folder with its config.json."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.json("config.json")

    def has(self, *names: str) -> bool:
        """Return whether all these files or folders are in it."""
        return all((self.path / name).exists() for name in names)

    def json(self, name: str) -> Values:
        """Return a JSON object in it. Raises CheckpointError if the file is missing or holds anything else."""
        path = self.path / name
        if not path.is_file():
            raise CheckpointError(f"{path}: the file does not exist")
        return dict(Fields.of(read_json(path, CheckpointError), str(path), CheckpointError).values)

    def tensors(self, name: str = ".") -> dict[str, Stored]:
        """Return the tensors of a file in it, or of the weights in a folder of it."""
        return read_tensors(self.path / name)


@dataclass(kw_only=True)
class Checkpoint:
    """A folder of another project, described in our terms."""

    layout: str
    config: LMMConfig
    """Its parts and what is known of its training: the template is not, it follows from the tokenizer."""
    weights: dict[str, Stored]
    """By the names of ``LMM.state_dict()``."""
    ignored: list[str]
    """Stored names that the model has no use for, such as tower layers above the one that is read."""
    tokenizer: str
    """Folder or hub id with the tokenizer."""
    processor_sources: list[str | None]
    """Folders that may hold the image processor, the first that does is used; without any, the tower's defaults."""
    unknown: list[str] = field(default_factory=list)
    """Stored names that belong to no component."""
    adapter: Lora | None = None
    """Low-rank updates of some weights, not yet merged into them."""


class Layout(ABC):
    """One way of laying out a model in a folder."""

    name: ClassVar[str]
    holds: ClassVar[str]
    """The content of such a folder, for the message that lists the known layouts."""

    @abstractmethod
    def recognizes(self, folder: Folder) -> bool:
        """Return whether the folder is laid out this way."""

    @abstractmethod
    def open(self, folder: Folder, sources: Sources) -> Checkpoint:
        """Describe its model. Raises CheckpointError for a damaged folder or a part that is nowhere to be found."""


LAYOUTS: Registry[type[Layout]] = Registry("checkpoint layout", "tinyllava_fast.models.checkpoints")


def layout_of(folder: Folder) -> Layout:
    """Return the layout of a folder. Raises CheckpointError saying what it holds and which layouts are known."""
    for name in LAYOUTS:
        if (layout := LAYOUTS.get(name)()).recognizes(folder):
            return layout
    config = folder.config
    files = sorted(p.name + "/" * p.is_dir() for p in folder.path.iterdir())
    known = "\n".join(f"  {name}: {LAYOUTS.get(name).holds}" for name in LAYOUTS)
    raise CheckpointError(
        f"{folder.path}: no known model: config.json has model_type {config.get('model_type')!r}, architectures "
        f"{config.get('architectures')!r}; the folder holds {', '.join(files)}. Besides our own, these layouts are "
        f"known:\n{known}"
    )
