"""Folders of LLaVA and TinyLLaVABench that hold only the part that a stage trained: a projector or an adapter.

The language model they belong to is elsewhere: in the folder that config.json names or ``--llm`` gives, either a
language model of its own or a whole checkpoint under LLaVA's names.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.models.checkpoints import _parts, _towers
from tinyllava_fast.models.checkpoints._base import LAYOUTS, Checkpoint, Folder, Layout, Sources
from tinyllava_fast.models.checkpoints._lora import CONFIG as ADAPTER
from tinyllava_fast.models.checkpoints._lora import NO_USE, read_lora
from tinyllava_fast.models.checkpoints._tensors import Stored, holds_weights, read_tensors
from tinyllava_fast.models.checkpoints.legacy import BENCH, LLAVA, PROJECTOR, TOWER, Bench, LegacyLayout, Llava15

_PROJECTOR_FILE, _TRAINED_FILE = "mm_projector.bin", "non_lora_trainables.bin"


@LAYOUTS.register("legacy_pretrain")
class Projector(Layout):
    """mm_projector.bin, and vision_tower/ where the tower was tuned too."""

    name = "legacy_pretrain"
    holds = "pretrain output of TinyLLaVABench or LLaVA: config.json, mm_projector.bin; the language model elsewhere"

    def recognizes(self, folder: Folder) -> bool:
        """See the base class."""
        return _is_legacy(folder) and folder.has(_PROJECTOR_FILE) and not holds_weights(folder.path)

    def open(self, folder: Folder, sources: Sources) -> Checkpoint:
        """See the base class."""
        base, tensors = _base(folder, sources, None)
        found = folder.tensors(_PROJECTOR_FILE)
        tensors |= {PROJECTOR + k.rpartition("mm_projector.")[2]: v for k, v in found.items()}
        if (folder.path / "vision_tower").is_dir():
            tensors = {k: v for k, v in tensors.items() if not k.startswith(TOWER)}
            tensors |= {TOWER + k.removeprefix(TOWER): v for k, v in folder.tensors("vision_tower").items()}
        return _describe(self.name, folder, sources, base, tensors)


@LAYOUTS.register("legacy_lora")
class LoraAlone(Layout):
    """An adapter of peft and non_lora_trainables.bin."""

    name = "legacy_lora"
    holds = "LoRA output of TinyLLaVABench or LLaVA: adapter_config.json, non_lora_trainables.bin; the base elsewhere"

    def recognizes(self, folder: Folder) -> bool:
        """See the base class."""
        return _is_legacy(folder) and folder.has(ADAPTER, _TRAINED_FILE) and not holds_weights(folder.path)

    def open(self, folder: Folder, sources: Sources) -> Checkpoint:
        """See the base class."""
        base, tensors = _base(folder, sources, folder.json(ADAPTER).get("base_model_name_or_path"))
        trained = {k.removeprefix("base_model."): v for k, v in folder.tensors(_TRAINED_FILE).items()}
        if any(k.startswith("model.model.") for k in trained):
            trained = {k.removeprefix("model."): v for k, v in trained.items()}
        stored = tensors | trained
        checkpoint = _describe(self.name, folder, sources, base, stored)
        vision = checkpoint.config.vision
        names = {id(tensor): name for name, tensor in stored.items()}
        ours = {names[id(tensor)]: name for name, tensor in checkpoint.weights.items() if id(tensor) in names}

        def rename(name: str) -> str | None:
            if not name.startswith(TOWER):
                return ours.get(name)
            # The tower's weights may be from a folder of its own, under other names: its class says which is which.
            inner = name.removeprefix(TOWER)
            found, _ = _parts.vision_weights(vision.type, {inner: Stored.of(name, torch.empty(0))})
            number, kept = _towers.layer_number(inner), vision.config["num_hidden_layers"]
            if number is not None and number >= kept:
                return NO_USE
            return next((ours_too for ours_too in found if ours_too in checkpoint.weights), None)

        checkpoint.adapter = read_lora(folder.path, rename)
        return checkpoint


def _is_legacy(folder: Folder) -> bool:
    config = folder.config
    return config.get("model_type") in {**BENCH, **LLAVA} and "mm_vision_tower" in config


def _base(folder: Folder, sources: Sources, named: str | None) -> tuple[Path, dict[str, Stored]]:
    """Return the folder of the language model and its tensors, under LLaVA's names."""
    name = sources.llm or named or folder.config.get("_name_or_path")
    path = Path(str(name))
    if not name or not path.is_dir() or not holds_weights(path):
        raise CheckpointError(
            f"{folder.path}: it holds only what was trained; the language model {name!r} that it belongs to is no "
            "folder with weights; give that folder: --llm FOLDER"
        )
    return path, read_tensors(path)


def _describe(layout: str, folder: Folder, sources: Sources, base: Path, tensors: dict[str, Stored]) -> Checkpoint:
    kind: LegacyLayout = Bench() if folder.config["model_type"] in BENCH else Llava15()
    checkpoint = kind.describe(folder, Sources(llm=str(base), vision=sources.vision), tensors)
    checkpoint.layout = layout
    checkpoint.config.origin["llm"] = str(base)
    return checkpoint
