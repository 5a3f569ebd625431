"""A look inside as one HTML file, and the object of numbers that its script draws; the server's page draws it, too."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

import numpy as np
from PIL import Image

from tinyllava_fast.look.curves import RANDOM
from tinyllava_fast.look.types import ATTENTION, METHODS, RELATIVE, Curve, Look, Map
from tinyllava_fast.page import card, document, facts_list

LABELS: Mapping[str, str] = {
    "gradient_pixels": "gradient x pixel",
    "gradient_features": "gradient x tower feature",
    "gradient_rows": "gradient x connector row",
    RELATIVE: "attention, relative to a neutral question",
    ATTENTION: "attention, raw",
}
MOST_BYTES = 6 * 2**20
"""Of the maps of all heads; beyond, only the means of each layer are kept."""
MOST_ROWS = 1024
"""Image rows whose similarities are kept."""
LONGEST = 672
"""Pixels of a picture's longer side in the file."""


def page(look: Look, facts: Sequence[tuple[str, str]] = ()) -> str:
    """Return the HTML file. facts: names and values for its end, the model's for example."""
    data = json.dumps(payload(look), separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    resources = files("tinyllava_fast.look")
    body = (
        f"<header>\n<h1>{escape(look.answer) or '(nothing)'}</h1>\n"
        '<p class="note">What the model looked at, and how much the answer depends on it.</p>\n</header>\n'
        '<section class="card" id="look"><noscript><p>This page needs JavaScript.</p></noscript></section>\n'
        + card("How to read it", "", _trust(look))
        + card("How it was made", "", facts_list([*facts, ("neutral question", look.neutral)]))
        + f'\n<script type="application/json" id="look-data">{data}</script>\n'
        + f"<script>\n{resources.joinpath('viewer.js').read_text(encoding='utf-8')}"
        'const data = document.getElementById("look-data").textContent;\n'
        'showLook(document.getElementById("look"), JSON.parse(data));\n</script>'
    )
    style = resources.joinpath("viewer.css").read_text(encoding="utf-8")
    return document(escape(f"{look.question}: {look.answer}"), body, style=style)


def payload(look: Look) -> dict[str, object]:
    """Return what viewer.js draws: numbers, texts and pictures, as JSON has them."""
    kept = sum(a.nbytes // 4 for layer in look.heads for a in layer) * 2 <= MOST_BYTES
    return {
        "question": look.question,
        "answer": look.answer,
        "pictures": [
            {"src": _source(p), "width": p.width, "height": p.height, "boxes": boxes}
            for p, boxes in zip(look.pictures, look.boxes, strict=True)
        ],
        "methods": [{"name": name, "label": LABELS[name], "note": note} for name, note in METHODS.items()],
        "tokens": [
            {
                "text": t.text,
                "probability": t.probability,
                "alternatives": t.alternatives,
                "ends": t.ends,
                "shares": vars(t.shares),
                "maps": {name: [_map(m) for m in some] for name, some in t.maps.items()},
            }
            for t in look.tokens
        ],
        "answer_maps": {name: [_map(m) for m in look.maps(name)] for name in METHODS},
        "layers": {ATTENTION: _layers(look.heads, kept), RELATIVE: _layers(look.relative, kept)},
        "rows": _rows(look),
        "sinks": [vars(s) for s in look.sinks],
        "curves": _curves(look.curves) if look.curves else None,
    }


def _trust(look: Look) -> str:
    """HTML: what the curves say of the maps of this answer, in numbers."""
    notes = [
        "A map is a guess at what mattered. The curves test it on this answer; one picture proves little, so compare "
        "methods over many with tlf-bench look or tlf-eval --explain.",
        "Raw attention misleads: sinks take it whatever is asked. It stands beside the relative map for comparison.",
    ]
    text = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    if not look.curves:
        return text
    random = look.curves[RANDOM]
    head = "<tr><th>map</th><th>deletion area (less is better)</th><th>insertion area (more is better)</th></tr>"
    rows = "".join(
        f"<tr><td>{LABELS[name]}</td><td>{look.curves[name].deletion_area:.3f}</td>"
        f"<td>{look.curves[name].insertion_area:.3f}</td></tr>"
        for name in METHODS
    )
    last = (
        f"<tr><td>random orders</td><td>{random.deletion_area:.3f} ± {random.deletion_error:.3f}</td>"
        f"<td>{random.insertion_area:.3f} ± {random.insertion_error:.3f}</td></tr>"
    )
    return f"{text}<table>{head}{rows}{last}</table>"


def _map(one: Map) -> dict[str, object]:
    peak = float(one.values.max())
    return {"n": one.values.shape[-1], "inputs": len(one.values), "peak": peak, "data": _levels(one.values[None])}


def _levels(values: np.ndarray) -> str:
    """Values [m, inputs, n, n] in 256 levels of each map's own peak, base64."""
    peaks = values.reshape(len(values), -1).max(-1).clip(1e-30)
    scaled = values / peaks.reshape(-1, *[1] * (values.ndim - 1))
    return base64.b64encode((scaled * 255).round().astype(np.uint8).tobytes()).decode()


def _layers(layers: Sequence[Sequence[np.ndarray]], kept: bool) -> list[dict[str, object]]:
    """Of each layer the maps of the heads' mean and, if there is room, of each head: [1 + H, R, inputs, n, n]."""
    found = []
    for pictures in layers:
        maps = []
        for one in pictures:
            mean = one.mean(0, keepdims=True)
            every = np.concatenate([mean, one]) if kept else mean
            maps.append(
                {"n": one.shape[-1], "inputs": one.shape[2], "data": _levels(every.reshape(-1, *one.shape[2:]))}
            )
        found.append({"heads": pictures[0].shape[0] if kept else 0, "kept": kept, "maps": maps})
    return found


def _rows(look: Look) -> dict[str, object]:
    similarity = None
    if len(look.similarity) <= MOST_ROWS:
        levels = (look.similarity * 127 + 127).round().clip(0, 255).astype(np.uint8)
        similarity = [base64.b64encode(row.tobytes()).decode() for row in levels]
    return {
        "centers": [(p, round(x, 1), round(y, 1)) for p, x, y in look.centers],
        "lens": look.lens.texts,
        "probabilities": np.round(look.lens.probabilities, 4).tolist(),
        "similarity": similarity,
    }


def _curves(curves: Mapping[str, Curve]) -> dict[str, object]:
    def plain(curve: Curve) -> dict[str, object]:
        return {k: np.round(v, 5).tolist() if isinstance(v, np.ndarray) else v for k, v in vars(curve).items()}

    count = len(curves[RANDOM].deletion)
    own = {name: plain(curve) for name, curve in curves.items() if name != RANDOM}
    return {"at": np.linspace(0, 1, count).round(5).tolist(), "random": plain(curves[RANDOM]), "maps": own}


def _source(picture: Image.Image) -> str:
    """A picture as a data URL, at most LONGEST pixels a side; small ones stay as they are."""
    shown = picture.copy()
    shown.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    small = shown.width * shown.height <= 128 * 128
    shown.save(buffer, "PNG" if small else "JPEG", quality=88)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
