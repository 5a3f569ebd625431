"""The looks inside of an evaluation (``tlf-eval --explain``) as a part of its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from tinyllava_fast.fields import Fields, read_object
from tinyllava_fast.look.curves import RANDOM
from tinyllava_fast.look.page import LABELS
from tinyllava_fast.look.types import DEFAULT, METHODS

LOOKS, INDEX = "looks", "looks.json"
"""A folder beside a benchmark's results, and the file in it that lists its pages."""


def section(folder: Path) -> str:
    """Return HTML about the looks in a results folder; "" if there are none."""
    path = folder / LOOKS / INDEX
    if not path.is_file():
        return ""
    looks = read_object(path).mappings("looks", empty=True)
    shots = "\n".join(_shot(folder, one.values) for one in looks)
    note = (
        f"Under the default map ({LABELS[DEFAULT]}), each with a page of its own. The areas are those of the answer's "
        "probability while the most important parts of the picture are removed (deletion, less is better) and brought "
        "back (insertion, more is better); ± one standard error over the questions."
    )
    return f'<h3>A look inside</h3><p class="note">{note}</p><div class="shots wide">\n{shots}\n</div>\n{_table(looks)}'


def _shot(folder: Path, one: Mapping[str, object]) -> str:
    link = escape(f"{folder.name}/{LOOKS}/{one['page']}")
    prompt, answer, truth, source = (escape(str(one[name])) for name in ("prompt", "answer", "truth", "thumbnail"))
    return (
        f'<div class="shot {one["kind"]}"><a href="{link}"><img alt="map" src="{source}"></a><div>'
        f'<div class="q">{prompt}</div><div class="a">{answer or "(nothing)"}</div><div class="t">truth: {truth}</div>'
        "</div></div>"
    )


def _table(looks: Sequence[Fields]) -> str:
    rows = ["<tr><th>map</th><th>answers</th><th>deletion area</th><th>insertion area</th></tr>"]
    for kind in ("right", "wrong"):
        some = [one for one in looks if one.values.get("kind") == kind]
        for method in (*METHODS, RANDOM) if some else ():
            label = LABELS.get(method, "random orders")
            areas = ([one.mapping(of).number(method) for one in some] for of in ("deletion", "insertion"))
            cells = "".join(f"<td>{_mean(each)}</td>" for each in areas)
            rows.append(f"<tr><td>{label}</td><td>{len(some)} {kind}</td>{cells}</tr>")
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def _mean(values: Sequence[float]) -> str:
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{error}"
