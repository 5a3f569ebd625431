"""Towers and connectors by name: the toolkit's own. A Hub repository has a file of this name with its model's alone."""

from __future__ import annotations

from typing import Any

from tinyllava_fast.models.connectors.base import CONNECTORS
from tinyllava_fast.models.vision.base import VISION


def tower_class(name: str) -> Any:
    """Return the class of a vision tower."""
    return VISION.get(name)


def connector_class(name: str) -> Any:
    """Return the class of a connector."""
    return CONNECTORS.get(name)
