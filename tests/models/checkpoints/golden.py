"""The reference's tiny checkpoints: opened once, and what it computed with them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinyllava_fast.models.checkpoints.base import Folder, Sources, layout_of
from tinyllava_fast.models.checkpoints.load import Opened, open_checkpoint

GOLDEN = Path(__file__).parents[2] / "golden"
MODELS = sorted(p.name for p in (GOLDEN / "models").iterdir())
LAYOUT = {"mono": "factory", "split": "factory_split", "lora": "factory_lora", "legacy": "tinyllava_bench"}
_FACTORY = {"llm": "language_model.", "vision": "vision_tower._vision_tower.", "connector": "connector._connector."}
_OWN = (*_FACTORY.values(), "model.vision_tower.vision_tower.", "model.mm_projector.", "_connector.")


def folder(name: str) -> Path:
    return GOLDEN / "models" / name / "checkpoint"


@functools.cache
def record(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / "models" / name / "record.json").read_text(encoding="utf-8"))


@functools.cache
def arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "models" / name / "record.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def sources(name: str) -> Sources:
    """The towers stand for hub ids: their folders have the configs and processors that the hub would give."""
    tower = {"mof": "clip"}.get(record(name)["tower"], record(name)["tower"])
    return Sources(vision=str(GOLDEN / "components" / f"tiny-{tower}"), vision2=str(GOLDEN / "components/tiny-dinov2"))


@functools.cache
def opened(name: str) -> Opened:
    return open_checkpoint(folder(name), sources=sources(name))


def factory_names(name: str) -> dict[str, str]:
    """Our names of the weights -> TinyLLaVA Factory's."""
    checkpoint = layout_of(at := Folder(folder(name))).open(at, sources(name))
    found = {}
    for ours, stored in checkpoint.weights.items():
        component = ours.partition(".")[0]
        key = next((stored.key.removeprefix(p) for p in _OWN if stored.key.startswith(p)), stored.key)
        found[ours] = _FACTORY[component] + key
    return found
