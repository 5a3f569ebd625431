"""`tlf-bench packing`: how full the packs of an epoch are, and how long planning it takes, on lengths like LLaVA-1.5's.

No record is read: lengths are drawn from a distribution that is stated here and in the report, in the shape of
LLaVA-1.5's instruction mix (665 thousand records, about 6 % of them text only, several questions about an image).

    with an image   tokens_per_image + 40 of system text + a sum over turns
    text only       exp(N(ln 900, 0.8))
    turns           1 + exp(N(ln 3.6, 0.7)) rounded down, at most 20: 5 on average, as in that mix
    of a turn       exp(N(ln 20, 0.5)) of a question and its frame + exp(N(ln 12, 1.2)) of an answer

Everything is cut at ``longest``, as ``data.max_tokens`` does. The plan is the product's own (ops.pack_plan) with a
training run's look-ahead, over records in random order. On average a record has some 320 tokens of text, near the
estimate that configs/paper is built on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from tinyllava_fast.bench import report
from tinyllava_fast.bench.timing import at_least_one
from tinyllava_fast.config.schema import BatchConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.ops import pack_plan

SYSTEM_TOKENS, MOST_TURNS = 40, 20
IMAGE_TOKENS = (196, 576, 729)  # SigLIP-B/16-224; CLIP-L/14-336; SigLIP-so400m/14-384
BUDGETS = (4096, 8448, 16384)  # 8448: configs/paper


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is planned. Raises UserError for values that no plan exists for."""

    records: int = 665_000
    text_only: float = 0.06  # share of the records
    longest: int = 2048  # tokens of a sample, image included
    budgets: tuple[int, ...] = BUDGETS
    image_tokens: tuple[int, ...] = IMAGE_TOKENS
    lookahead: int = BatchConfig.lookahead
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one(self, "records", "lookahead")
        if not 0 <= self.text_only <= 1:
            raise UserError(f"--text-only {self.text_only}: a share, from 0 to 1")
        if min(self.budgets) < self.longest:
            raise UserError(f"--tokens {min(self.budgets)}: less than the longest sample of {self.longest} tokens")
        if max(self.image_tokens) + SYSTEM_TOKENS >= self.longest or min(self.image_tokens) < 1:
            raise UserError(f"--image-tokens {self.image_tokens}: an image and {SYSTEM_TOKENS} tokens of text must fit")


def draw_lengths(settings: Settings, tokens_per_image: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, images) of each record, both [records] int64, in random order."""
    rng = np.random.default_rng(settings.seed)
    count = settings.records
    turns = np.minimum(1 + rng.lognormal(np.log(3.6), 0.7, count).astype(np.int64), MOST_TURNS)
    total = int(turns.sum())
    spoken = rng.lognormal(np.log(20), 0.5, total) + rng.lognormal(np.log(12), 1.2, total)
    starts = np.concatenate([[0], np.cumsum(turns)[:-1]])
    lengths = tokens_per_image + SYSTEM_TOKENS + np.add.reduceat(spoken, starts)
    images = (rng.random(count) >= settings.text_only).astype(np.int64)
    lengths = np.where(images == 1, lengths, rng.lognormal(np.log(900), 0.8, count))
    return np.clip(lengths.astype(np.int64), 1, settings.longest), images


def benchmark(settings: Settings | None = None) -> dict[str, Any]:
    """Plan one epoch for every budget and number of image tokens.

    Returns rows {image_tokens, budget, efficiency, packs, samples_per_pack, seconds, padded_efficiency, ...} and the
    settings. efficiency: real tokens over the tokens of all packs, the last one included; padded_efficiency: the same
    of batches of 8 in the same order, padded to their longest sample.
    """
    settings = settings or Settings()
    rows = []
    one = torch.ones(1, dtype=torch.int64)
    pack_plan(one, one, one, 1, 1, 1, 1)  # loads the extension
    for tokens_per_image in settings.image_tokens:
        lengths, images = draw_lengths(settings, tokens_per_image)
        for budget in settings.budgets:
            rows.append({"image_tokens": tokens_per_image, "budget": budget, **plan(lengths, images, budget, settings)})
    return {"rows": rows, "settings": asdict(settings), "threads": torch.get_num_threads()}


def plan(lengths: np.ndarray, images: np.ndarray, budget: int, settings: Settings) -> dict[str, Any]:
    """Plan these samples into packs of ``budget`` tokens, which bound nothing but tokens; the facts of one row."""
    need, shown, ones = (torch.from_numpy(column) for column in (lengths, images, np.ones_like(lengths)))
    began = time.perf_counter()
    packs = pack_plan(need, shown, ones, budget, budget, budget, settings.lookahead)
    seconds = time.perf_counter() - began
    count = int(packs.max()) + 1
    held = np.bincount(packs.numpy(), weights=lengths, minlength=count)
    return {
        "efficiency": float(lengths.sum() / (count * budget)),
        "padded_efficiency": _padded(lengths, 8),
        "packs": count,
        "samples_per_pack": len(lengths) / count,
        "most_images": int(np.bincount(packs.numpy(), weights=images).max()),
        "most_samples": int(np.bincount(packs.numpy()).max()),
        "emptiest": float(held[:-1].min() / budget) if count > 1 else float(held[0] / budget),
        "mean_tokens": float(lengths.mean()),
        "seconds": seconds,
    }


def quick(settings: Settings) -> Settings:
    """The same with few records."""
    return Settings(**{**asdict(settings), "records": min(settings.records, 2000)})


def _padded(lengths: np.ndarray, batch: int) -> float:
    whole = lengths[: len(lengths) // batch * batch].reshape(-1, batch) if len(lengths) >= batch else lengths[None]
    return float(whole.sum() / (whole.max(1).sum() * whole.shape[1]))


def show(result: dict[str, Any]) -> None:
    """The report as a table."""
    settings = result["settings"]
    rows = [
        [
            str(row["image_tokens"]),
            f"{row['mean_tokens']:.0f}",
            str(row["budget"]),
            f"{100 * row['efficiency']:.2f} %",
            f"{100 * row['padded_efficiency']:.1f} %",
            f"{row['packs']:,}",
            f"{row['samples_per_pack']:.1f}",
            f"{row['most_images']}",
            report.seconds(row["seconds"]),
        ]
        for row in result["rows"]
    ]
    columns: Sequence[str] = (
        "tokens an image", "tokens a sample", "budget", "efficiency", "padded, 8 a batch", "packs", "samples a pack",
        "most images", "planning",
    )  # fmt: skip
    title = f"Packing {settings['records']:,} records, {100 * settings['text_only']:.0f} % text only"
    report.show(f"{title}, at most {settings['longest']} tokens, look-ahead {settings['lookahead']}", columns, rows)
