"""What a look inside finds: where each token of an answer looked, how sure it was, and how far the maps can be trusted.

Legend: L layers, H heads of a layer, R generated tokens, I image rows, g patches a side of the tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from tinyllava_fast.data.images import Box

ATTENTION, RELATIVE = "attention", "relative"
ROWS, FEATURES, PIXELS = "gradient_rows", "gradient_features", "gradient_pixels"
METHODS: Mapping[str, str] = {
    PIXELS: "Gradient x pixel: how the token's log-probability changes with the pixels that the tower sees, times "
    "how far they are from the picture's mean colour. As fine as the pixels.",
    FEATURES: "Gradient x feature: the same for the tower's tokens, less their mean.",
    ROWS: "Gradient x row: the same for the connector's rows, less their mean.",
    RELATIVE: "Attention to each row divided by that for a neutral question (arXiv:2502.17422), the mean over layers.",
    ATTENTION: "Attention as it is, the mean over layers and heads. It misleads: a few rows take most of it whatever "
    "is asked, and attention to a row is no use made of it.",
}
"""The kinds of maps. The first one wins in docs/look.md, and is the default."""
DEFAULT = next(iter(METHODS))


@dataclass(frozen=True)
class Map:
    """Mass over one picture. values: [inputs of the tower, n, n], row by row; boxes: the part that each input shows.

    The masses of all pictures of a look add up to 1, what lies on padding included.
    """

    values: np.ndarray
    boxes: Sequence[Box]
    size: tuple[int, int]

    def mass(self, box: Box) -> float:
        """Return the mass inside a box (left, top, right, bottom) of the picture."""
        left, top, right, bottom = box
        return float(self._shared(np.array([left, right]), np.array([top, bottom]))[0, 0])

    def raster(self, columns: int, rows: int) -> np.ndarray:
        """Return the mass of each cell, [rows, columns], of a grid over the picture."""
        return self._shared(np.linspace(0, self.size[0], columns + 1), np.linspace(0, self.size[1], rows + 1))

    def _shared(self, across: np.ndarray, down: np.ndarray) -> np.ndarray:
        total = np.zeros((len(down) - 1, len(across) - 1))
        for values, (left, top, right, bottom) in zip(self.values, self.boxes, strict=True):
            side = len(values)
            columns = _overlap(np.linspace(left, right, side + 1), across)
            rows = _overlap(np.linspace(top, bottom, side + 1), down)
            total += rows.T @ values @ columns
        return total


def _overlap(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the share of each interval between own edges, [n], that lies in each between the others', [n, m]."""
    low = np.maximum(own[:-1, None], others[None, :-1])
    high = np.minimum(own[1:, None], others[None, 1:])
    return np.clip(high - low, 0, None) / np.diff(own)[:, None]


@dataclass(frozen=True)
class Shares:
    """Shares of attention by what is attended to, the mean over layers and heads; they add up to 1."""

    image: float
    question: float
    """Of all text of the prompt, but for its first token."""
    first: float
    """Of the prompt's first token, which takes attention that nothing else wants: a sink."""
    answer: float
    """Of the answer so far."""


@dataclass(frozen=True)
class TokenLook:
    """One generated token. alternatives: (text, probability) of the likeliest, likeliest first. maps: one a picture."""

    id: int
    text: str
    probability: float
    alternatives: Sequence[tuple[str, float]]
    shares: Shares
    maps: Mapping[str, Sequence[Map]]
    ends: bool = False
    """Whether it is the token that ends the answer."""


@dataclass(frozen=True)
class Lens:
    """The logit lens: what each image row would be read as if the model ended after a layer.

    texts, probabilities: [layers, rows], of the likeliest token.
    """

    texts: Sequence[Sequence[str]]
    probabilities: np.ndarray


@dataclass(frozen=True)
class Sink:
    """A position that takes attention or has a norm out of proportion. row: of the image; -1: text."""

    position: int
    row: int
    text: str
    norm: float
    """Largest norm of its hidden state after a layer, in medians over the prompt."""
    share: float
    """Its share of the answer's attention."""


@dataclass(frozen=True)
class Curve:
    """The answer's probability while cells of the pictures are replaced, most important ones first, or brought back.

    values: [steps + 1]. area: below it, over shares of the picture from 0 to 1. Of random orders the mean, with the
    standard error of its area.
    """

    deletion: np.ndarray
    insertion: np.ndarray
    deletion_area: float
    insertion_area: float
    deletion_error: float = 0.0
    insertion_error: float = 0.0


@dataclass(frozen=True)
class Look:
    """A look inside one answer."""

    question: str
    neutral: str
    answer: str
    pictures: Sequence[Image.Image]
    tokens: Sequence[TokenLook]
    heads: Sequence[Sequence[np.ndarray]]
    """Attention to the patches of each layer, a picture: [H, R, inputs, g, g] for each; not normalized."""
    relative: Sequence[Sequence[np.ndarray]]
    """The same divided by the neutral question's, of rows, spread over patches."""
    boxes: Sequence[Sequence[Box]]
    """Of each picture's inputs."""
    lens: Lens
    similarity: np.ndarray
    """Cosines of the connector's rows, [I, I], centred."""
    centers: Sequence[tuple[int, float, float]]
    """(picture, x, y) of each image row, in pixels: the mean place of what it reads."""
    sinks: Sequence[Sink]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """By method, and "random"; empty if they were not asked for."""

    def maps(self, method: str = DEFAULT, token: int | None = None) -> list[Map]:
        """Return the map of each picture: of one token by its number, or the mean of all but the ending one."""
        if token is not None:
            return list(self.tokens[token].maps[method])
        chosen = [t for t in self.tokens if not t.ends] or list(self.tokens)
        found = []
        for index in range(len(self.pictures)):
            each = [t.maps[method][index] for t in chosen]
            found.append(Map(np.mean([m.values for m in each], 0), each[0].boxes, each[0].size))
        return found
