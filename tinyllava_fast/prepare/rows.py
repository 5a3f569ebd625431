"""Records written again: as LLaVA's objects, one a line of JSON, which every reader of records here takes."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from PIL import Image

from tinyllava_fast.data.formats._embedded import Embedded, picture_of
from tinyllava_fast.data.pictures import open_bytes
from tinyllava_fast.data.record import Record


def line_of(record: Record, base: Path) -> str:
    """Return a record as a line of JSON, with its end.

    Paths of images stay as they are. An image that lies inside the source becomes a data URI. base: see picture_of.
    DataError for one that cannot be read.
    """
    row: dict[str, object] = {"id": record.id}
    images = [_image(image, base) for image in record.images]
    if images:
        row["image"] = images if record.interleaved else images[0]
    if record.system is not None:
        row["system"] = record.system
    said = [message for turn in record.turns for message in zip(("human", "gpt"), turn, strict=True)]
    row["conversations"] = [{"from": who, "value": text} for who, text in said]
    return json.dumps(row, ensure_ascii=False) + "\n"


def _image(image: str, base: Path) -> str:
    picture = picture_of(image, "", base)
    if not isinstance(picture, Embedded):
        return image
    content = picture.read()
    with open_bytes(content, str(picture)) as opened:
        kind = Image.MIME.get(opened.format or "", "application/octet-stream")
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
