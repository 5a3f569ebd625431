"""Deletion and insertion curves (arXiv:1806.07421): whether the model needs what a map says that it looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from tinyllava_fast.data.images import blank_image
from tinyllava_fast.look.attention import answer_log_probabilities
from tinyllava_fast.look.prompt import Prompt, Prompts
from tinyllava_fast.look.types import Curve, Map

Fill = Literal["blank", "mean", "blur"]
FILLS: tuple[Fill, ...] = get_args(Fill)
RANDOM = "random"
ORDERS = 8
"""Random orders that a map is compared with."""
MOST_CELLS, MOST_STEPS = 14, 16
"""Cells a side of a picture, and steps of a curve."""
INPUTS_A_PASS = 32


def curves(
    prompts: Prompts,
    prompt: Prompt,
    tokens: Sequence[int],
    maps: Mapping[str, Sequence[Map]],
    vocab: int,
    fill: Fill,
    seed: int,
    *,
    orders: int = ORDERS,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Curve]:
    """Return the curves of each kind of map, and of random orders under RANDOM.

    The pictures are divided into cells, as many a side as the tower has patches, at most MOST_CELLS. fill: cells
    become the mean colour of the pictures that the tower was made for ("blank": zero once normalized), the picture's
    own mean colour, which may still tell the colour of what is in it, or its blurred copy. The value is the
    probability of the answer's ``tokens``. between: called between passes; what it raises passes through.
    """
    cells = min(MOST_CELLS, prompts.lmm.vision.image_size, prompts.side)
    ranked = {name: _order([m.raster(cells, cells) for m in some]) for name, some in maps.items()}
    total = cells * cells * len(prompt.pictures)
    generator = np.random.default_rng(seed)
    shuffled = [generator.permutation(total) for _ in range(orders)]
    steps = np.unique(np.linspace(0, total, min(total, MOST_STEPS) + 1).round().astype(int))
    blank = np.asarray(blank_image(prompts.images.processor, 1))[0, 0]
    filled = [_filled(picture, fill, blank) for picture in prompt.pictures]
    wanted: dict[bytes, np.ndarray] = {}  # many orders begin and end with the same pictures

    def masks(order: np.ndarray) -> list[np.ndarray]:
        found = []
        for count in steps:
            mask = np.zeros(total, bool)
            mask[order[:count]] = True
            found += [mask, ~mask]
        return found

    everything = {name: masks(order) for name, order in ranked.items()} | {
        f"{RANDOM} {n}": masks(order) for n, order in enumerate(shuffled)
    }
    for some in everything.values():
        wanted.update((mask.tobytes(), mask) for mask in some)
    with torch.no_grad():
        log_p = answer_log_probabilities(
            prompts.lmm,
            _embeds(prompts, prompt, tokens, filled, list(wanted.values()), cells, between),
            torch.tensor(tokens, device=prompts.lmm.device),
            vocab=vocab,
        )
    values = dict(zip(wanted, log_p.exp().tolist(), strict=True))
    at = steps / total
    each = {name: _curve([values[m.tobytes()] for m in some], at) for name, some in everything.items()}
    random = [each.pop(f"{RANDOM} {n}") for n in range(orders)]
    return {**each, RANDOM: _mean(random)}


def _order(rasters: Sequence[np.ndarray]) -> np.ndarray:
    """Numbers of the cells of all pictures, the one with most mass first; of equals the first."""
    return np.argsort(-np.concatenate([r.ravel() for r in rasters]), kind="stable")


def _filled(picture: Image.Image, fill: Fill, blank: np.ndarray) -> np.ndarray:
    """What a picture's parts are replaced by, [H, W, 3] uint8."""
    pixels = np.asarray(picture)
    if fill != "blur":
        colour = blank if fill == "blank" else pixels.mean((0, 1)).round()
        return np.broadcast_to(colour.astype(np.uint8), pixels.shape)
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 8)))


def _embeds(
    prompts: Prompts,
    prompt: Prompt,
    tokens: Sequence[int],
    filled: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    cells: int,
    between: Callable[[], None],
) -> Iterator[Tensor]:
    """The embeddings of prompt and answer with the masked cells replaced, the tower run on many at once."""
    inputs = sum(prompt.inputs)
    at_once = max(1, INPUTS_A_PASS // inputs)
    for start in range(0, len(masks), at_once):
        between()
        some = masks[start : start + at_once]
        pictures = [one for mask in some for one in _replaced(prompt.pictures, filled, mask, cells)]
        encoded = prompts.lmm.encode_images(prompts.pixels(pictures))
        for one in encoded.split(inputs):
            yield prompts.embeds(prompt, one, tokens)


def _replaced(
    pictures: Sequence[Image.Image], filled: Sequence[np.ndarray], mask: np.ndarray, cells: int
) -> list[Image.Image]:
    """The pictures with their masked cells replaced. mask: [pictures * cells * cells]."""
    found = []
    for picture, other, grid in zip(pictures, filled, mask.reshape(len(pictures), cells, cells), strict=True):
        rows = np.arange(picture.height) * cells // picture.height
        columns = np.arange(picture.width) * cells // picture.width
        hidden = grid[rows][:, columns, None]
        found.append(Image.fromarray(np.where(hidden, other, np.asarray(picture))))
    return found


def _curve(values: Sequence[float], at: np.ndarray) -> Curve:
    """values: alternately without and with only the first cells."""
    deletion, insertion = np.array(values[0::2]), np.array(values[1::2])
    return Curve(deletion, insertion, _area(deletion, at), _area(insertion, at))


def _area(values: np.ndarray, at: np.ndarray) -> float:
    return float(((values[1:] + values[:-1]) / 2 * np.diff(at)).sum())


def _mean(some: Sequence[Curve]) -> Curve:
    deletions, insertions = ([getattr(c, f"{kind}_area") for c in some] for kind in ("deletion", "insertion"))

    def error(areas: list[float]) -> float:
        return float(np.std(areas, ddof=1) / len(areas) ** 0.5) if len(areas) > 1 else 0.0

    return Curve(
        np.mean([c.deletion for c in some], 0),
        np.mean([c.insertion for c in some], 0),
        float(np.mean(deletions)),
        float(np.mean(insertions)),
        error(deletions),
        error(insertions),
    )
