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
from dataclasses import asdict

import numpy as np
import torch

from tinyllava_fast.bench import report
from tinyllava_fast.bench.report import Report
from tinyllava_fast.bench.settings import SYSTEM_TOKENS, PackingSettings
from tinyllava_fast.ops import pack_plan

MOST_TURNS = 20


def draw_lengths(settings: PackingSettings, tokens_per_image: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens, images) of each record, both [records] int64, in random order."""
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


def benchmark(settings: PackingSettings) -> Report:
    """Plan one epoch for every budget and number of image tokens.

    Returns rows {image_tokens, budget, efficiency, packs, samples_per_pack, seconds, padded_efficiency, ...} and the
    settings. efficiency: real tokens over the tokens of all packs, the last one included; padded_efficiency: the same
    of batches of 8 in the same order, padded to their longest sample.
    """
    rows = []
    one = torch.ones(1, dtype=torch.int64)
    pack_plan(one, one, one, 1, 1, 1, 1)  # loads the extension
    for tokens_per_image in settings.image_tokens:
        lengths, images = draw_lengths(settings, tokens_per_image)
        for budget in settings.budgets:
            rows.append({"image_tokens": tokens_per_image, "budget": budget, **plan(lengths, images, budget, settings)})
    return {"rows": rows, "settings": asdict(settings), "threads": torch.get_num_threads()}


def plan(lengths: np.ndarray, images: np.ndarray, budget: int, settings: PackingSettings) -> Report:
    """Plan these samples into packs of ``budget`` tokens, which bound nothing but tokens; returns one row."""
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


def _padded(lengths: np.ndarray, batch: int) -> float:
    whole = lengths[: len(lengths) // batch * batch].reshape(-1, batch) if len(lengths) >= batch else lengths[None]
    return float(whole.sum() / (whole.max(1).sum() * whole.shape[1]))


COLUMNS = {
    "tokens an image": "{image_tokens}",
    "tokens a sample": "{mean_tokens:.0f}",
    "budget": "{budget}",
    "efficiency": "{efficiency:.2 %}",
    "padded, 8 a batch": "{padded_efficiency:.1 %}",
    "packs": "{packs:,}",
    "samples a pack": "{samples_per_pack:.1f}",
    "most images": "{most_images}",
    "planning": "{seconds:time}",
}


def show(result: Report) -> None:
    """Print the report as a table."""
    title = "Packing {records:,} records, {text_only:.0 %} text only, at most {longest} tokens, look-ahead {lookahead}"
    report.table(report.fill(title, result["settings"]), COLUMNS, result["rows"])
