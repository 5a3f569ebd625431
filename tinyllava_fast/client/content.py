"""The content of a message to an endpoint: texts, and pictures as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tinyllava_fast.data.pictures import UPRIGHT, naming, opened, to_rgb
from tinyllava_fast.errors import DataError

Part = dict[str, object]
"""A part of a message, as OpenAI's requests have them."""
Content = str | list[Part]


def content_of(parts: Sequence[Part]) -> Content:
    """Return the parts, or the text alone where there is no picture: not every server takes a list then."""
    if len(parts) == 1 and "text" in parts[0]:
        return str(parts[0]["text"])
    return list(parts)


def text_part(text: str) -> Part:
    """Return a text as a part."""
    return {"type": "text", "text": text}


def image_part(uri: str) -> Part:
    """Return a picture as a part. uri: what ``data_uri`` gives."""
    return {"type": "image_url", "image_url": {"url": uri}}


def data_uri(path: str | Path) -> str:
    """Return the bytes of an image file as they are. DataError for a file that no picture can be decoded from."""
    with opened(path) as image:
        to_rgb(image, UPRIGHT)
        kind = "image/jpeg" if image.format == "MPO" else Image.MIME.get(image.format or "", "")
    if not kind.startswith("image/"):
        raise DataError(f"{naming(path)}: this kind of picture has no name that a server would know; save it as PNG")
    try:
        return _uri(Path(path).read_bytes(), kind)
    except OSError as error:
        raise DataError(f"{naming(path)}: cannot be read: {error.strerror}") from None


def drawn_uri(image: Image.Image) -> str:
    """Return an image object as a PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return _uri(file.getvalue(), "image/png")


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
