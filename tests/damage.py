"""One place of a JSON value changed: what tests of damaged files have in common."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

DROP = object()
"""In place of a new value: the field is left out."""


def changed(value: Any, place: Sequence[Any], new: Any) -> Any:
    """Return a copy with the place, the keys and indices that lead to it, changed or dropped."""
    value = copy.deepcopy(value)
    inside = value
    for step in place[:-1]:
        inside = inside[step]
    if new is DROP:
        del inside[place[-1]]
    else:
        inside[place[-1]] = new
    return value
