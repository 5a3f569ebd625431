"""Docstrings as Markdown, for the API reference: each argument on a line of its own, examples as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ARGUMENT = re.compile(r"(?P<names>[a-z_]\w*(?:, [a-z_]\w*)*)(?P<shape> \([^)]*\))?: (?P<text>.+)")


class Lists(griffe.Extension):
    """Rewrites the docstrings of what is loaded; the files stay as they are."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """See the base class."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """Return a docstring's text with its arguments as a list and its examples as blocks of code."""
    lines: list[str] = []
    code = False
    for line in text.splitlines():
        example = line.startswith((">>> ", "... ")) or (code and bool(line.strip()))
        if example != code:
            lines += ["```", ""] if code else ["", "```pycon"]
            code = example
        argument = _ARGUMENT.match(line)
        if argument and not code:
            lines += ["", f"- **{argument['names']}**{argument['shape'] or ''}: {argument['text']}"]
        elif line.startswith(("Raises ", "Returns ", "UserError ")) and not code:
            lines += ["", line]
        else:
            lines.append(line)
    return "\n".join([*lines, "```"] if code else lines)
