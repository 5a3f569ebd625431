"""Features of a frozen tower, kept on disk: from the second epoch or run on, no tower runs.

    <cache>/features/<first byte of the key>/<key>    16 bytes of header (magic, CRC-32, length), then the values

The key is a digest of the *pixels* as the tower would get them, of its weights, and of all that decides what it does
with them (class, configuration, layer, dtype). A changed image, processor or tower has another key, so nothing stale
can be found. Entries are written aside and renamed, so a killed writer leaves none, and several processes and runs
share the folder without locks. What does not match its checksum is removed and computed again.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import time
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from tinyllava_fast.config.augment import AugmentConfig
from tinyllava_fast.config.schema import DataConfig, EngineConfig, RecipeConfig
from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.errors import UserError
from tinyllava_fast.files import TMP, write_file
from tinyllava_fast.log import log
from tinyllava_fast.models.vision.base import VisionTower

FORMAT = 1
_HEADER = struct.Struct("<4sIQ")
_MAGIC = b"TLFF"
_STALE_S = 3600.0  # a temporary file of that age has no writer any more
_KEEP = 0.9  # share of the limit that is left after an eviction


def check_feature_cache(data: DataConfig, recipe: RecipeConfig, engine: EngineConfig, where: str) -> None:
    """Raise UserError where features cannot be kept: the tower trains, images vary, or its weights are sharded."""
    key = f"{where}.data.feature_cache"
    if not data.feature_cache:
        return
    if recipe.vision.tune != "frozen":
        raise UserError(f"{key}: the tower trains ({where}.recipe.vision.tune: {recipe.vision.tune}); set it to 0")
    if data.augment != AugmentConfig():
        raise UserError(f"{key}: {where}.data.augment changes images every epoch; remove one of the two")
    if engine.sharding == 3:
        raise UserError(
            f"{key}: ZeRO 3 and fsdp shard the tower, which has to run by itself; use engine.zero_stage 0 to 2, or "
            "engine.type: ddp"
        )


class FeatureCache:
    """Looks features up, and computes and stores those that are missing.

    tower: frozen, in its training dtype and on its device. limit: bytes on disk; the entries used longest ago go first.
    hits, misses, damaged: entries so far.
    """

    def __init__(self, folder: Path, tower: VisionTower, *, limit: int) -> None:
        self.folder, self.tower, self.limit = folder, tower, limit
        self.hits = self.misses = self.damaged = 0
        self._weight = next(tower.parameters())
        self._shape = (tower.num_tokens, tower.hidden_size)
        self._tower_digest = digest_tower(tower)
        self._bytes = self._evict()

    def attach(self, batch: PackedBatch) -> PackedBatch:
        """The batch with features [N, K, V] in place of its pixels [N, 3, H, W]."""
        batch = batch.to("cpu")  # where its pixels are normalized
        pixels = batch.pixel_values
        keys = [self.key(image) for image in pixels]
        found = [self._read(key) for key in keys]
        if any(f is None for f in found):
            with torch.no_grad():  # all of the batch: the same product whether one is missing or many
                made = self.tower(pixels.to(self._weight.device)).cpu()
            for index, key in enumerate(keys):
                if found[index] is None:
                    self._write(key, made[index])
                    found[index] = made[index]
        rows = [f for f in found if f is not None]
        features = torch.stack(rows) if rows else torch.zeros(0, *self._shape, dtype=self._weight.dtype)
        return replace(batch, pixel_values=features)

    def key(self, pixels: Tensor) -> str:
        """Name of the entry of one image [3, H, W] float32."""
        digest = hashlib.blake2b(self._tower_digest, digest_size=24)
        digest.update(repr((tuple(pixels.shape), str(pixels.dtype))).encode())
        digest.update(_bytes(pixels))
        return digest.hexdigest()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _read(self, key: str) -> Tensor | None:
        path = self._path(key)
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                tensor = self._parse(view)
            if tensor is not None:
                os.utime(path)
        except FileNotFoundError:
            self.misses += 1
            return None
        except (OSError, ValueError):  # an empty file cannot be mapped
            tensor = None
        if tensor is None:
            self.damaged += 1
            log.warning("%s: damaged; the features are computed again", path)
            path.unlink(missing_ok=True)
            return None
        self.hits += 1
        return tensor

    def _parse(self, view: mmap.mmap) -> Tensor | None:
        """The values, or None if any byte is not as it was written."""
        size = self._shape[0] * self._shape[1] * self._weight.dtype.itemsize
        if len(view) != _HEADER.size + size:
            return None
        body = view[_HEADER.size :]
        if _HEADER.unpack(view[: _HEADER.size]) != (_MAGIC, zlib.crc32(body), size):
            return None
        return torch.frombuffer(bytearray(body), dtype=self._weight.dtype).view(self._shape)

    def _write(self, key: str, features: Tensor) -> None:
        body = _bytes(features)
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not synced: the check sum tells what a power cut leaves, and it is computed again.
            write_file(path, _HEADER.pack(_MAGIC, zlib.crc32(body), len(body)) + body, durable=False)
        except OSError as error:
            raise UserError(
                f"data.feature_cache: {path} cannot be written ({error}); free some space, set TLF_CACHE to another "
                "folder, or set data.feature_cache to 0"
            ) from None
        self._bytes += _HEADER.size + len(body)
        if self._bytes > self.limit:
            self._bytes = self._evict()

    def _evict(self) -> int:
        """Remove the entries used longest ago, of whatever tower, if the folder exceeds the limit; its bytes then."""
        entries: list[tuple[float, int, Path]] = []
        for path in self.folder.glob("??/*"):
            try:
                facts = path.stat()
            except FileNotFoundError:  # another process evicts too
                continue
            if not path.name.startswith(TMP):
                entries.append((facts.st_mtime, facts.st_size, path))
            elif time.time() - facts.st_mtime > _STALE_S:
                path.unlink(missing_ok=True)
        total = sum(size for _, size, _ in entries)
        if total <= self.limit:
            return total
        for _, size, path in sorted(entries):
            if total <= _KEEP * self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total


def digest_tower(tower: VisionTower) -> bytes:
    """A digest of the weights and of everything else that decides a tower's features."""
    digest = hashlib.sha256(
        json.dumps([FORMAT, type(tower).__name__, asdict(tower.describe())], sort_keys=True).encode()
    )
    for name, tensor in tower.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.digest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
