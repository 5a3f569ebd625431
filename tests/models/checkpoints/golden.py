"""The reference's tiny checkpoints: put together, opened once, and what it computed with them."""

from __future__ import annotations

import functools
import json
import lzma
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.vectors import GOLDEN, shared
from tinyllava_fast.models.checkpoints._base import Folder, Sources, layout_of
from tinyllava_fast.models.checkpoints._load import Opened, open_checkpoint

STORED = sorted(p.name for p in (GOLDEN / "models").iterdir() if p.is_dir())
BESIDE = [  # the repository: too large for it
    "gemma-siglip-mlp2x_gelu-mono",
    "legacy-phi-siglip",
    "openelm-clip-mlp2x_gelu-mono",
    "stablelm-clip-resampler-mono",
    "stablelm-siglip-mlp2x_gelu-mono",
]
MODELS = sorted([*STORED, *BESIDE])
LAYOUT = {"mono": "factory", "split": "factory_split", "lora": "factory_lora", "legacy": "tinyllava_bench"}
_FACTORY = {"llm": "language_model.", "vision": "vision_tower._vision_tower.", "connector": "connector._connector."}
_OWN = (*_FACTORY.values(), "model.vision_tower.vision_tower.", "model.mm_projector.", "_connector.")
_TEMPORARY = tempfile.TemporaryDirectory(prefix="golden-")


@functools.cache
def _row() -> np.ndarray:
    """The numbers of all stored weights; the file has their four bytes apart (tests/golden/pack.py)."""
    planes = np.frombuffer(lzma.decompress((GOLDEN / "models" / "weights.xz").read_bytes()), np.uint8)
    return np.ascontiguousarray(planes.reshape(4, -1).T).view(np.float32)[:, 0]


def _tensor(offset: int, *shape: int) -> Tensor:
    return torch.from_numpy(_row()[offset : offset + int(np.prod(shape))].reshape(shape).copy())


def _place(name: str) -> Path:
    stored = GOLDEN / "models" / name
    return shared(f"models/{name}") if name in BESIDE else stored


def _value(name: str, file: str) -> object:
    return json.loads((_place(name) / file).read_text(encoding="utf-8"))


@functools.cache
def folder(name: str) -> Path:
    """Return a checkpoint's folder as the reference wrote it; tests copy what they change."""
    if name in BESIDE:
        return _place(name) / "checkpoint"
    target = Path(_TEMPORARY.name) / name
    with zipfile.ZipFile(_place(name) / "checkpoint.zip") as archive:
        archive.extractall(target)
    for inside, places in _value(name, "parts.json")["weights"].items():
        file = target / inside
        file.parent.mkdir(exist_ok=True)
        tensors = {key: _tensor(*place) for key, place in places.items()}
        if file.suffix == ".safetensors":
            save_file(tensors, file, {"format": "pt"})
        else:
            torch.save(tensors, file)
    return target


@functools.cache
def record(name: str) -> dict[str, object]:
    return _value(name, "record.json")


def grad_norms(name: str) -> dict[str, float]:
    return _value(name, "grad_norms.json")


@functools.cache
def arrays(name: str) -> dict[str, Tensor]:
    """Return what the reference computed; ``infer_logits`` are those at ``infer_positions``."""
    with np.load(_place(name) / "record.npz") as file:
        found = {key: torch.from_numpy(file[key]) for key in file.files}
    if name in BESIDE:
        found["infer_positions"] = torch.arange(found["infer_logits"].shape[1])
        found["batch_logits_first"] = found.pop("batch_logits_first32")
        return found
    with np.load(GOLDEN / "pixels.npz") as file:
        for key, names in _value(name, "parts.json")["pixels"].items():
            images = {name: torch.from_numpy(file[name]) for name in names if name}
            found[key] = torch.stack([images[n] if n else torch.zeros_like(next(iter(images.values()))) for n in names])
    return found


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
