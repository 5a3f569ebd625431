"""Checks of a model folder's files, and one place where the errors of the libraries that read them become sentences.

A damaged file makes transformers, tokenizers, peft and torch raise nearly anything: KeyError, ZeroDivisionError,
RecursionError, a panic of Rust. ``reading`` names the file instead.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tinyllava_fast.errors import CheckpointError, UserError
from tinyllava_fast.fields import Fields, read_json

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

    from tinyllava_fast.models.vision.base import VisionTower

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_MOST_PIXELS = 1 << 14  # of a side
_PART_KEYS = {
    "llm": ("type", "config", "options"),
    "vision": ("type", "config", "feature_select", "options"),
    "connector": ("type", "options"),
}
_FLAGS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad")
_RESAMPLE = 5  # the last of Pillow's filters


@contextmanager
def reading(where: str, error: type[UserError] = CheckpointError) -> Iterator[None]:
    """Run the block, which lets another library read a file; whatever that raises becomes ``error`` with ``where``."""
    try:
        yield
    except UserError:
        raise
    except BaseException as bad:
        if not isinstance(bad, Exception) and type(bad).__name__ != "PanicException":  # Rust's, of tokenizers
            raise
        raise error(f"{where}: {_said(bad)}") from bad


def _said(error: BaseException) -> str:
    text = str(error).strip()
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text:  # torch's advice is to run the code
        return (
            "its weights are a pickle that holds code or objects, not only tensors, or is damaged; nothing of it was "
            "run. Save its tensors as safetensors where you trust it"
        )
    if isinstance(error, (OSError, ValueError, ImportError)) and text:
        return text
    return f"it holds something that cannot be used ({type(error).__name__}: {' '.join(text.split())[:300]})"


def check_parts(config: Fields) -> None:
    """Raise for a part of our own config.json that is missing or not of its kind.

    llm, vision, connector: {type, config, options, feature_select}, of which the values of ``options`` are checked
    where they are used, and those of ``config`` by transformers.
    """
    for name, keys in _PART_KEYS.items():
        part = config.mapping(name)
        for key, hint in part.unknown(keys).items():
            raise part.error(f"{part.where}: {key}: unknown key; {hint}")
        part.text("type")
        part.mapping("options", None)
        if "config" in keys:
            part.mapping("config")
        if "feature_select" in keys:
            part.text("feature_select")


def _check_range(fields: Fields, name: str, least: int, most: int) -> None:
    value = fields.values[name]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        fields.fail(name, f"a whole number from {least} to {most}", value)


def processor_fields(folder: str | Path) -> Fields | None:
    """The keys of the image processor of a folder, checked; None where it has none. Raises naming file and field."""
    for name in PROCESSORS:
        path = Path(folder) / name
        if path.is_file():
            fields = Fields.of(read_json(path, CheckpointError), str(path), CheckpointError)
            fields = fields.mapping("image_processor") if "image_processor" in fields.values else fields
            _check_processor(fields)
            return fields
    return None


def read_processor(tower: type[VisionTower], folder: str | Path) -> BaseImageProcessor:
    """The image processor of a folder, as the PIL class of a tower. Raises CheckpointError unless it makes pixels."""
    fields = processor_fields(folder)
    with reading(f"{fields.where if fields else folder}: the image processor cannot be read"):
        processor = tower.processor_class.from_pretrained(str(folder))
        pixels = processor(Image.new("RGB", (16, 16)), return_tensors="np")["pixel_values"]
        if not np.isfinite(pixels).all():
            raise ValueError("it makes pixels that are not finite")
    return processor


def _check_processor(fields: Fields) -> None:
    for name in _FLAGS:
        fields.boolean(name, None)
    for name in ("size", "crop_size"):
        _check_side(fields, name)
    for name in ("image_mean", "image_std"):
        _check_channels(fields, name)
    if "resample" in fields:
        _check_range(fields, "resample", 0, _RESAMPLE)
    if fields.number("rescale_factor", 1.0) == 0:
        fields.fail("rescale_factor", "a number other than 0", 0)


def _check_side(fields: Fields, name: str) -> None:
    """A number of pixels, or an object of such numbers."""
    if name not in fields:
        return
    if not isinstance(fields.values[name], dict):
        _check_range(fields, name, 1, _MOST_PIXELS)
        return
    sides = fields.mapping(name)
    if not sides.values:
        fields.fail(name, "height and width, or shortest_edge", {})
    for key, value in sides.values.items():
        if value is not None:
            _check_range(sides, key, 1, _MOST_PIXELS)


def _check_channels(fields: Fields, name: str) -> None:
    """Three finite numbers, or one for all channels; a deviation is not 0."""
    if name not in fields:
        return
    given = fields.values[name]
    numbers = given if isinstance(given, list) else [given]
    kinds_fit = all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
    if len(numbers) not in (1, 3) or not kinds_fit or (name == "image_std" and min(numbers) <= 0):
        positive = " above 0" if name == "image_std" else ""
        fields.fail(name, f"three finite numbers{positive}, of red, green and blue", given)
