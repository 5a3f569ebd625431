"""Pages that people read: one HTML file each, styles and images inside it, so it opens anywhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from PIL import Image

THUMBNAIL = 256


def document(title: str, body: str, *, refresh_s: float | None = None, style: str = "") -> str:
    """Return an HTML file with the style sheet inside it. title, body: HTML. refresh_s: seconds to its next reading.

    style: rules of this page alone.
    """
    again = "" if refresh_s is None else f'<meta http-equiv="refresh" content="{refresh_s:.0f}">\n'
    css = files("tinyllava_fast").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{again}<title>{title}</title>\n<style>\n{css}{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def card(title: str, note: str, inside: str) -> str:
    """A section of the page. Arguments are HTML."""
    said = f'<p class="note">{note}</p>' if note else ""
    return f'<section class="card">\n<h2>{title}</h2>\n{said}\n{inside}\n</section>'


def facts_list(facts: Iterable[tuple[str, str]]) -> str:
    """Names and values, one pair a line."""
    return "<dl>\n" + "\n".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in facts) + "\n</dl>"


def columns(counts: Sequence[int], ticks: Sequence[str], label: str, said: str) -> str:
    """Counts as the columns of a chart, inline SVG. ticks: texts spread evenly below them. said: one line below all."""
    left, wide, tall = 56, 482, 120
    width = wide / len(counts)
    parts = [f'<svg class="chart" viewBox="0 0 560 {tall + 48}" role="img" aria-label="{escape(label)}">']
    for number, count in enumerate(counts):
        height = tall * count / max(*counts, 1)
        place = f'x="{left + number * width:.1f}" y="{8 + tall - height:.1f}"'
        parts.append(f'<rect class="column" {place} width="{max(width - 1, 0.5):.1f}" height="{height:.1f}"/>')
    for number, tick in enumerate(ticks):
        x = left + wide * number / max(len(ticks) - 1, 1)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{tall + 26}" text-anchor="middle">{escape(tick)}</text>')
    parts.append(f'<text class="tick" x="280" y="{tall + 44}" text-anchor="middle">{escape(said)}</text>')
    return "\n".join([*parts, "</svg>"])


def inline(image: Image.Image, format: str = "PNG") -> str:
    """The image, shrunk to a thumbnail, as a data URL."""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format, optimize=True)
    return f"data:image/{format.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()
