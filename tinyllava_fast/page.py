"""Pages that people read: one HTML file each, styles and images inside it, no script, so it opens anywhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from importlib.resources import files

from PIL import Image

THUMBNAIL = 256


def document(title: str, body: str, *, refresh_s: float | None = None) -> str:
    """Return an HTML file with the style sheet inside it. title, body: HTML. refresh_s: seconds to its next reading."""
    again = "" if refresh_s is None else f'<meta http-equiv="refresh" content="{refresh_s:.0f}">\n'
    css = files("tinyllava_fast").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{again}<title>{title}</title>\n<style>\n{css}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def card(title: str, note: str, inside: str) -> str:
    """A section of the page. Arguments are HTML."""
    said = f'<p class="note">{note}</p>' if note else ""
    return f'<section class="card">\n<h2>{title}</h2>\n{said}\n{inside}\n</section>'


def facts_list(facts: Iterable[tuple[str, str]]) -> str:
    """Names and values, one pair a line."""
    return "<dl>\n" + "\n".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in facts) + "\n</dl>"


def inline(image: Image.Image, format: str = "PNG") -> str:
    """The image, shrunk to a thumbnail, as a data URL."""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format, optimize=True)
    return f"data:image/{format.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()
