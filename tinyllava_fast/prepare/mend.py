"""Mend what is certain of a record that training refuses: the spelling of image paths, and markers left out."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache

from tinyllava_fast.data.formats._embedded import is_reference
from tinyllava_fast.data.record import Record
from tinyllava_fast.data.templates.base import Template
from tinyllava_fast.data.types import IMAGE_TOKEN


def mended(record: Record, template: Template, folder: str) -> Record:
    """Return the record with all mended that can be; the same one if that is nothing.

    A path gets / in place of a backslash and the case of the one file that differs in nothing else. Images that no
    question shows go to the front of the first one, in order. folder: that the paths are relative to.
    """
    images = tuple(_found(image, folder) for image in record.images)
    turns = record.turns
    if images and not template.needs_image and not any(IMAGE_TOKEN in question for question, _ in turns):
        question, answer = turns[0]
        turns = ((f"{IMAGE_TOKEN}\n" * len(images) + question, answer), *turns[1:])
    return replace(record, images=images, turns=turns)


def _found(image: str, folder: str) -> str:
    if is_reference(image) or os.path.exists(os.path.join(folder, image)):
        return image
    path = os.path.normpath(image.replace("\\", "/"))
    if os.path.exists(os.path.join(folder, path)):
        return path
    parent, name = os.path.split(path)
    other = _names(os.path.join(folder, parent)).get(name.lower())
    return os.path.join(parent, other) if other else image


@lru_cache(64)
def _names(folder: str) -> dict[str, str]:
    """Return the names in a folder by what they are in small letters; "" where several are the same so."""
    found: dict[str, str] = {}
    try:
        names = os.listdir(folder)
    except OSError:
        return found
    for name in names:
        found[name.lower()] = "" if name.lower() in found else name
    return found
