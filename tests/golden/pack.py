"""Make tests/golden/models from the originals (``python -m tests.golden.pack``); README.md says what is kept.

Nothing is computed: weights are stored once for all checkpoints that share them, and of the recorded arrays those
that tests read, some of them sliced. tests/models/checkpoints/golden.py puts the checkpoints together again.
"""

from __future__ import annotations

import json
import lzma
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.vectors import GOLDEN, SHARED

STORED = (
    "legacy-tinyllama-siglip",
    "llava15-tinyllama-clip",
    "phi-mof-mof_mlp-mono",
    "phi-mof-mof_mlp-split",
    "phi-siglip-mlp2x_gelu-mono",
    "qwen2-clip-mlp2x_gelu-mono",
    "qwen2-dinov2-mlp2x_gelu-mono",
    "qwen2-siglip-linear-split",
    "tinyllama-clip-mlp2x_gelu-mono",
    "tinyllama-siglip-mlp2x_gelu-lora",
)
KEPT = (
    "infer_tower_features",
    "infer_tower_features_clip",
    "infer_tower_features_dinov2",
    "infer_connector_output",
    "infer_inputs_embeds",
    "batch_attention_mask",
    "batch_input_ids",
    "batch_labels",
    "batch_logits_logsumexp",
)
EVERY, FIRST = 16, 8  # of infer_logits: positions from the last backwards; of batch_logits_first32: entries


def read(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file."""
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


class Weights:
    """All tensors of all checkpoints in one row, each once."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.offsets: dict[bytes, int] = {}
        self.length = 0

    def add(self, tensor: Tensor) -> list[int]:
        """Return where a tensor begins in the row, and its shape."""
        assert tensor.dtype == torch.float32
        values = tensor.contiguous().numpy().tobytes()
        if values not in self.offsets:
            self.offsets[values] = self.length
            self.pieces.append(values)
            self.length += tensor.numel()
        return [self.offsets[values], *tensor.shape]

    def write(self, file: Path) -> None:
        """The four bytes of every number apart: sign and exponent compress, what follows does not."""
        planes = np.frombuffer(b"".join(self.pieces), np.uint8).reshape(-1, 4).T
        file.write_bytes(lzma.compress(np.ascontiguousarray(planes).tobytes()))


def pixel_names(images: np.ndarray, known: dict[bytes, str]) -> list[str | None]:
    """Return the keys of pixels.npz that hold these images; None stands for zeros."""
    return [known[image.tobytes()] if image.any() else None for image in images]


def cut(record: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays that tests read."""
    logits = record["infer_logits"]
    positions = np.arange(logits.shape[1])[::-EVERY][::-1]
    return {
        **{key: record[key] for key in KEPT if key in record},
        "infer_positions": positions,
        "infer_logits": logits[:, positions],
        "batch_logits_first": record["batch_logits_first32"][..., :FIRST],
    }


def pack(name: str, weights: Weights, known: dict[bytes, str]) -> None:
    """Store one checkpoint with its record."""
    source, target = SHARED / "models" / name, GOLDEN / "models" / name
    parts: dict[str, Any] = {"weights": {}, "pixels": {}}
    target.mkdir(parents=True)
    checkpoint = source / "checkpoint"
    with zipfile.ZipFile(target / "checkpoint.zip", "w") as archive:
        for file in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
            inside = str(file.relative_to(checkpoint))
            if file.suffix in (".safetensors", ".bin"):
                parts["weights"][inside] = {key: weights.add(value) for key, value in read(file).items()}
            else:
                entry = zipfile.ZipInfo(inside)  # of no date: the archive depends on its files only
                archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED, 9)
    with np.load(source / "record.npz") as record:
        for key in ("infer_pixel_values", "batch_pixel_values"):
            parts["pixels"][key] = pixel_names(record[key], known)
        np.savez_compressed(target / "record.npz", **cut(record))
    for name in ("record.json", "grad_norms.json"):
        shutil.copyfile(source / name, target / name)
    (target / "parts.json").write_text(json.dumps(parts) + "\n")


def main() -> None:
    """Store the checkpoints and their weights."""
    shutil.rmtree(GOLDEN / "models", ignore_errors=True)
    with np.load(GOLDEN / "pixels.npz") as pixels:
        known = {pixels[key].tobytes(): key for key in pixels.files}
    weights = Weights()
    for name in STORED:
        pack(name, weights, known)
    weights.write(GOLDEN / "models" / "weights.xz")


if __name__ == "__main__":
    main()
