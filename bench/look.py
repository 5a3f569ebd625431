"""`tlf-bench look`: what the maps of `tlf-look` are worth, on pictures where the right place is known.

easy-VQA's pictures hold one coloured shape on a plain background, so its box is found by colour. For each kind of map:
its mass inside the box over the box's share of the picture (chance is 1), and the areas of its deletion and insertion
curves against random orders of the same picture, paired. "contrast" is a control that asks no model: how far each
pixel is from the picture's mean colour. A map that is no better finds what stands out, not what the model uses.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from tinyllava_fast.bench import machine, report
from tinyllava_fast.bench.look_settings import LookSettings
from tinyllava_fast.bench.progress import progress
from tinyllava_fast.bench.report import Report
from tinyllava_fast.data.easy_vqa import load_questions, prepare
from tinyllava_fast.data.images import Box
from tinyllava_fast.errors import DataError
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.look.assistant import Assistant
from tinyllava_fast.look.curves import RANDOM, curves
from tinyllava_fast.look.types import METHODS, Look, Map

CONTRAST = "contrast"
_APART = 30  # levels, all channels together, that a shape is from its background


def benchmark(model: str, settings: LookSettings) -> Report:
    """Return rows {map, mass_over_chance, deletion_area, ..., p_deletion} and the settings.

    Differences are random minus map for deletion, map minus random for insertion, so more is better; p: of a paired,
    two-sided t-test over the pictures.
    """
    assistant = Assistant.from_pretrained(model)
    with tempfile.TemporaryDirectory(prefix="tlf-look-") as folder:
        data = prepare(settings.data or Path(folder) / "easy_vqa")
        asked = _questions(data, settings)
        found = [_one(assistant, data / "images", q, settings) for q in progress(asked, "looks")]
    rows = [_row(name, found) for name in (*METHODS, CONTRAST, RANDOM)]
    return {
        "rows": rows,
        "images": len(found),
        "right_answers": sum(bool(one["right"]) for one in found),
        "box_share": float(np.mean([one["chance"] for one in found])),
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("data", "quick")},
        "machine": machine.describe(),
    }


def show(result: Report) -> None:
    """Print the table."""
    columns = ("map", "mass in the box / chance", "deletion area", "insertion area", "p (deletion)")
    rows = [
        (
            row["map"],
            f"{row['mass_over_chance']:.2f} ± {row['mass_error']:.2f}",
            f"{row['deletion_area']:.3f} ± {row['deletion_error']:.3f}",
            f"{row['insertion_area']:.3f} ± {row['insertion_error']:.3f}",
            f"{row['p_deletion']:.1e}",
        )
        for row in result["rows"]
    ]
    report.show(f"Maps of {result['images']} easy-VQA pictures", columns, rows)


def shape_box(pixels: np.ndarray) -> Box:
    """Return the box of the one shape of a picture [H, W, 3]. DataError if nothing stands out from its corner."""
    apart = np.abs(pixels.astype(int) - pixels[0, 0].astype(int)).sum(-1) > _APART
    rows, columns = np.nonzero(apart)
    if not len(rows):
        raise DataError("a picture of easy-VQA shows no shape; reinstall easy-vqa")
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


def _questions(data: Path, settings: LookSettings) -> list[dict[str, str]]:
    """One question about each of the first pictures, drawn by the seed."""
    by_image: dict[str, list[dict[str, str]]] = {}
    for q in load_questions(data):
        if settings.questions == "all" or q["type"] != "yes/no":
            by_image.setdefault(q["image"], []).append(q)
    rng = np.random.default_rng(settings.seed)
    return [some[rng.integers(len(some))] for some in list(by_image.values())[: settings.images]]


def _one(assistant: Assistant, folder: Path, q: Mapping[str, str], settings: LookSettings) -> dict[str, object]:
    request = Request.ask(q["question"], folder / q["image"], sampling=Sampling(max_new_tokens=8))
    looker, answer = assistant.looker, assistant.engine.answer(request)
    look = looker.look(request, answer.tokens, fill=None)
    pixels = np.asarray(look.pictures[0])
    box = shape_box(pixels)
    chance = (box[2] - box[0]) * (box[3] - box[1]) / (pixels.shape[0] * pixels.shape[1])
    maps = {name: look.maps(name) for name in METHODS} | {CONTRAST: _contrast(look, pixels)}
    tokens = [t.id for t in look.tokens if not t.ends] or [t.id for t in look.tokens]
    prompt = looker.prompts.prompt(request)
    found = curves(looker.prompts, prompt, tokens, maps, looker.vocab, settings.fill, settings.seed)
    masses = {name: some[0].mass(box) for name, some in maps.items()} | {RANDOM: chance}
    return {"chance": chance, "masses": masses, "curves": found, "right": answer.text == q["answer"]}


def _contrast(look: Look, pixels: np.ndarray) -> list[Map]:
    apart = np.abs(pixels - pixels.mean((0, 1))).sum(-1)
    size = look.pictures[0].size
    return [Map(apart[None] / apart.sum(), [(0.0, 0.0, float(size[0]), float(size[1]))], size)]


def _row(name: str, found: Sequence[Mapping[str, object]]) -> dict[str, object]:
    def area(kind: str, of: str) -> np.ndarray:
        return np.array([getattr(one["curves"][of], f"{kind}_area") for one in found])  # type: ignore[index]

    masses = np.array([one["masses"][name] for one in found])  # type: ignore[index]
    chance = np.array([one["chance"] for one in found], float)
    row: dict[str, object] = {"map": name}
    row["mass_over_chance"], row["mass_error"] = _ratio(masses, chance)
    for kind, sign in (("deletion", -1), ("insertion", 1)):
        own, random = area(kind, name), area(kind, RANDOM)
        row[f"{kind}_area"], row[f"{kind}_error"] = float(own.mean()), _error(own)
        better = sign * (own - random)
        row[f"{kind}_better"], row[f"{kind}_better_error"] = float(better.mean()), _error(better)
        row[f"p_{kind}"] = paired_p(better)
    return row


def _ratio(masses: np.ndarray, chance: np.ndarray) -> tuple[float, float]:
    """Mean mass over mean chance, and its standard error."""
    ratio = float(masses.mean() / chance.mean())
    return ratio, _error(masses - ratio * chance) / float(chance.mean())


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def paired_p(differences: np.ndarray) -> float:
    """Return the two-sided p of Student's t-test that the mean difference is zero; 1 if all are zero."""
    error, freedom = _error(differences), len(differences) - 1
    if not error:
        return 1.0
    t = torch.tensor(abs(float(differences.mean()) / error), dtype=torch.float64)
    # tail of Student's t, by the substitution x = t + u / (1 - u)
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    x = t + u / (1 - u)
    log_density = -(freedom + 1) / 2 * torch.log1p(x**2 / freedom)
    norm = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    return min(1.0, float(2 * ((log_density + norm).exp() / (1 - u) ** 2).mean()))
