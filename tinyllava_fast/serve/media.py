"""Images that clients send or name, as pictures whose header is within the limits. Nothing is decoded here."""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from tinyllava_fast.data.pictures import check_header, open_bytes
from tinyllava_fast.errors import DataError
from tinyllava_fast.serve.limits import ServerLimits
from tinyllava_fast.serve.memory import PIXEL_BYTES, Share
from tinyllava_fast.serve.problems import ApiError, bad

Fetch = Callable[[str], Awaitable[bytes]]
"""Returns what an http(s) URL holds."""

_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*")
_GIF_FRAME = b"\x21\xf9\x04"  # begins a frame's control block
KNOWN = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF"


@dataclass(frozen=True)
class Media:
    """Reads the images of requests.

    folder: below which file URLs may name files; None: none. fetch: for http(s) URLs; None: none.
    """

    limits: ServerLimits
    folder: Path | None = None
    fetch: Fetch | None = None

    async def pictures(self, urls: Sequence[str], share: Share) -> list[Image.Image]:
        """Return one picture per URL, in order; what stands there several times is read once.

        share: holds the memory that they take once they are decoded. ApiError 400, 413 and 429.
        """
        found: dict[str, Image.Image] = {}
        for number, url in enumerate(urls):
            if url not in found:
                try:
                    found[url] = await self._picture(url, share)
                except ApiError as error:
                    if error.status != 400:
                        raise
                    error.message = f"image {number}: {error.message}"
                    error.param = error.param or "image_url"
                    error.code = error.code or "invalid_image"
                    raise
        return [found[url] for url in urls]

    async def _picture(self, url: str, share: Share) -> Image.Image:
        scheme = url[:16].partition(":")[0].lower()
        if scheme == "data":
            content = await asyncio.to_thread(from_data, url, self.limits.image_bytes)
        elif scheme in ("http", "https"):
            if self.fetch is None:
                raise bad("this server fetches no URLs; send the image as a data URI")
            content = await self.fetch(url)
        elif scheme == "file":
            if self.folder is None:
                raise bad("this server reads no files; send the image as a data URI")
            content = await asyncio.to_thread(from_file, url, self.folder, self.limits.image_bytes)
        else:
            raise bad("expected a data URI: data:image/png;base64,...")
        share.take(len(content))
        image = await asyncio.to_thread(open_checked, content, self.limits)
        share.take(2 * image.width * image.height * PIXEL_BYTES)  # as Pillow reads it, and in RGB
        return image


def from_data(url: str, most: int) -> bytes:
    """Return the bytes of a data URI in base64. ApiError 400 for another form, and for more bytes than that."""
    head, comma, text = url.partition(",")
    kind, _, coding = head[5:].rpartition(";")
    if not comma or coding.strip().lower() != "base64" or not (kind.lower().startswith("image/") or not kind):
        raise bad("expected a data URI of an image in base64: data:image/png;base64,...")
    if len(text) // 4 * 3 > most + 3:
        raise _too_large(most)
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise bad("its base64 is damaged") from None
    if len(content) > most:
        raise _too_large(most)
    return content


def from_file(url: str, folder: Path, most: int) -> bytes:
    """Return the bytes of a file URL below the folder, links resolved. ApiError 400 for all else, in the same words."""
    refused = bad("no image of that name in the media folder")
    try:
        parts = urlsplit(url)
        path = unquote(parts.path, errors="strict")
    except ValueError:
        raise refused from None
    if parts.netloc not in ("", "localhost") or "\0" in path or any(c in parts.path.lower() for c in ("%2f", "%5c")):
        raise refused
    root = os.path.realpath(folder)
    try:
        inner = os.path.relpath(os.path.realpath(path), root)
        if inner.startswith(".."):
            raise refused
        with os.fdopen(_open_below(root, inner), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise refused
            content = file.read(most + 1)
    except (OSError, ValueError):
        raise refused from None
    if len(content) > most:
        raise _too_large(most)
    return content


def _open_below(root: str, inner: str) -> int:
    """Open a file by its resolved path, following no link: one put there meanwhile is an OSError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe would wait for its writer
    here = os.open(root, flags | os.O_DIRECTORY)
    for name in Path(inner).parts[:-1]:
        try:
            there = os.open(name, flags | os.O_DIRECTORY, dir_fd=here)
        finally:
            os.close(here)
        here = there
    try:
        return os.open(Path(inner).name, flags, dir_fd=here)
    finally:
        os.close(here)


def open_checked(content: bytes, limits: ServerLimits) -> Image.Image:
    """Return a picture whose header has been read. ApiError 400 for what is none, or is larger than the limits."""
    webp = content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    if not (content.startswith(_STARTS) or webp or content[4:8] == b"ftyp"):
        raise bad(f"it is not a picture of a known format ({KNOWN})")
    try:
        image = open_bytes(content, "the picture")
        check_header(image)
    except DataError as error:
        raise bad(str(error)) from None
    if image.width * image.height > limits.pixels:
        raise bad(f"a picture of {image.width} x {image.height} pixels; at most {limits.pixels:,} are opened")
    if _frames(image, content, limits.frames) > limits.frames:
        raise bad(f"a picture of more than {limits.frames} frames")
    return image


def _frames(image: Image.Image, content: bytes, most: int) -> int:
    """Frames of a picture, as far as they can be counted without decoding them, and not far beyond ``most``."""
    if image.format == "GIF":  # Pillow would go through the whole file, frame by frame
        return content.count(_GIF_FRAME)
    if image.format == "TIFF":
        try:
            Image.open(BytesIO(content), formats=["TIFF"]).seek(most)
        except Exception:  # EOFError: it has fewer; damaged ones are told of when the first frame is decoded
            return 1
        return most + 1
    return int(getattr(image, "n_frames", 1))


def _too_large(most: int) -> ApiError:
    return bad(f"an image of more than {most:,} bytes")
