"""Image files and image objects to 8-bit RGB pictures: the right pixels, or a DataError that says why not.

The one room that opens pictures. How a picture is read is part of a model (PictureReading), so that training and
inference agree. Only formats that Pillow decodes by itself are opened: no picture ever starts another program, as
EPS (Ghostscript) would.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from tinyllava_fast.data.signatures import HEAD, what_it_is
from tinyllava_fast.errors import DataError
from tinyllava_fast.fields import shown
from tinyllava_fast.log import log

FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "QOI", "ICO", "ICNS", "CUR", "DIB",
    "DDS", "PSD", "SGI", "PCX", "DCX", "SUN", "XBM", "XPM", "MSP", "BLP", "FTEX", "GBR", "PIXAR", "TGA",
)  # fmt: skip
"""In the order in which they are tried; TGA has no signature. HEIF is there if a plugin of Pillow brings it."""

IMAGE_ALIASES = (
    *("img", "imgs", "picture", "pictures", "photo", "file", "file_name", "filename", "path", "image_path"),
    *("image_paths", "image_file", "image_files"),
)
"""Names that other formats have for the field of an image."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # where a PNG may say how it is turned
_WHITE_IS_ZERO = 0  # TIFF: PhotometricInterpretation
_LEAST_TOP = 4096  # 16-bit values that stay below are 10- or 12-bit ones: scaled as 16 bits they would be black

# Warnings of Pillow that name no file and that nobody can act on: a picture between its limit and twice the limit (it
# refuses larger ones); transparency that PictureReading says to drop; EXIF data that is damaged, beside whole pixels.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="Palette images with Transparency|(Possibly )?[Cc]orrupt EXIF data")


@dataclass(frozen=True)
class PictureReading:
    """A model's way to read pictures; the same in training and inference.

    orientation: upright turns a picture as its EXIF entry says; stored shows the pixels as the file has them. (Pillow
    itself turns TIFF files, in both.) background: white puts transparent pictures on white; drop ignores transparency,
    so that the colours that lie under it appear.
    """

    orientation: Literal["upright", "stored"] = "upright"
    background: Literal["white", "drop"] = "white"


UPRIGHT = PictureReading("upright", "white")
REFERENCE = PictureReading("stored", "drop")
"""The way of LLaVA and TinyLLaVA Factory: PIL's ``convert("RGB")`` alone."""


class MissingImageError(DataError):
    """The file is not there, or the disk that it is on does not answer. Never skipped: all others may be gone too."""


_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN)


class InsideFile(Protocol):
    """An image file that lies inside another file; its text is its name."""

    def read(self) -> bytes:
        """Return all of it. DataError with its name."""


Picture = str | Path | InsideFile


@contextmanager
def opened(picture: Picture) -> Iterator[Image.Image]:
    """Open the file as a PIL image of which only the header has been read. Errors in the body name this file.

    DataError for what is missing, no regular file, unreadable, no picture, of a format that is not opened, or damaged.
    """
    name = naming(picture)
    content = None if isinstance(picture, (str, Path)) else picture.read()
    if isinstance(picture, (str, Path)):
        _check_file(picture, name)

    def stream() -> BinaryIO:
        return open(str(picture), "rb") if content is None else io.BytesIO(content)

    try:
        with stream() as file, Image.open(file, formats=_formats()) as image:
            yield image
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    except PermissionError as error:
        raise DataError(f"{name}: no permission to read the file") from error
    except UnidentifiedImageError as error:
        with stream() as file:
            reason = what_it_is(file.read(HEAD), file.seek(0, os.SEEK_END))
        raise DataError(f"{name}: {reason}") from error
    except Exception as error:  # decoders of damaged files raise OSError, SyntaxError, struct.error, zlib.error, ...
        raise DataError(f"{name}: {_why(error)}") from error


def open_bytes(content: bytes, name: str) -> Image.Image:
    """Return the bytes of an image file as a PIL image, its header read; DataError with that name."""
    try:
        return Image.open(io.BytesIO(content), formats=_formats())
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: {what_it_is(content[:HEAD], len(content))}") from error
    except Exception as error:  # as in ``opened``
        raise DataError(f"{name}: {_why(error)}") from error


def to_rgb(image: Image.Image, reading: PictureReading) -> Image.Image:
    """Return the image (of an animation the current frame; of a file the first) as RGB; DataError saying why not.

    Grey values of 16 bits are scaled to 8. The caller's image keeps its pixels.
    """
    check_header(image)
    raw = _raw_mode(image)
    _mend_tiff(image)
    image.load()
    check_header(image)  # again: of an ICNS file the mode is known now
    turn = _TURNS.get(_orientation(image)) if reading.orientation == "upright" else None
    if image.mode == "I" or image.mode.startswith("I;"):
        image = _eight_bits(image)
    image = _flat(image, raw, reading.background)
    return image.transpose(turn) if turn is not None else image


def of_object(image: Image.Image, reading: PictureReading) -> Image.Image:
    """``to_rgb`` of an image object that somebody made or opened; DataError also for one that cannot be decoded."""
    with _told_of_object():
        return to_rgb(image, reading)


def object_size(image: Image.Image, reading: PictureReading) -> tuple[int, int]:
    """``size_of`` such an object, with the same errors."""
    with _told_of_object():
        check_header(image)
        return size_of(image, reading)


def size_of(image: Image.Image, reading: PictureReading) -> tuple[int, int]:
    """Return (width, height) of ``to_rgb``'s result, from the header as far as that tells it."""
    if image.format == "TIFF":
        width, height, orientation = _tiff_layout(image)
        return (height, width) if orientation >= 5 else (width, height)
    turned = reading.orientation == "upright" and not _plain_png(image) and _orientation(image) >= 5
    return (image.height, image.width) if turned else image.size


def check_header(image: Image.Image) -> None:
    """Raise DataError for what the header alone forbids: no pixels, a format that is not opened, unknown levels."""
    if min(image.size) < 1:
        raise DataError(f"a picture of {image.width} x {image.height} pixels shows nothing")
    if image.format is not None and image.format not in (*FORMATS, "MPO"):
        raise DataError(f"{image.format} pictures are not opened; give its .convert('RGB')")
    mode = image.mode
    if mode == "F" or (mode == "I" and image.format not in ("PPM", "PNG")):
        what = "floating-point numbers" if mode == "F" else "32-bit integers"
        raise DataError(f"its pixels are {what} (mode {mode}), of a range that nothing tells; save it with 8 bits")
    if mode == "I" or mode.startswith("I;"):
        _say_scaled()


def naming(picture: Picture) -> str:
    """Return the path for a message: as it is, or escaped where a terminal could not write it; a very long one cut."""
    text = str(picture)
    return text if text and text.isprintable() and len(text) <= 400 else shown(text)


@functools.cache
def _say_scaled() -> None:
    log.info("pictures with grey values of more than 8 bits: they are scaled to 8 bits")


@contextmanager
def _told_of_object() -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"the image object: {error}") from error
    except Exception as error:  # as in ``opened``
        raise DataError(f"the image object: {_why(error)}") from error


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def is_url(path: str | Path) -> bool:
    """Return True if it begins like a URL; file names may, so look for the file first."""
    return re.match(r"data:|[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)) is not None


def _check_file(path: str | Path, name: str) -> None:
    """Raise DataError unless the path is a regular file: opening a pipe or a device could wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        if is_url(path):
            raise DataError(f"{name}: a URL; pictures are not downloaded: save it to a file, give its path") from error
        number = getattr(error, "errno", None)
        if number in (errno.ENOENT, errno.ENOTDIR):
            raise MissingImageError(f"{name}: image file is missing") from error
        reason = getattr(error, "strerror", None) or error
        kind = MissingImageError if number in _GONE else DataError
        raise kind(f"{name}: the image file cannot be opened: {reason}") from error
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise DataError(f"{name}: it is {what}, not an image file")


def _why(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        found = re.search(r"\((\d+) pixels\)", str(error))
        pixels = f"{int(found[1]):,}" if found else "too many"
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"a picture of {pixels} pixels is larger than {most:,}, the most that is opened; make it smaller"
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode the picture; make it smaller"
    return f"truncated or not an image ({error or type(error).__name__})"


def _raw_mode(image: Image.Image) -> str:
    """Return the file's pixel format in Pillow's words (L;4, RGB;16B, ...), before it is decoded; "" if unknown."""
    for tile in getattr(image, "tile", []):
        args = tile[3]
        return args if isinstance(args, str) else str(args[0]) if args else ""
    return ""


def _tiff_layout(image: Image.Image) -> tuple[int, int, int]:
    """Return (width, height, orientation) of the pixels that a TIFF stores; once decoded, of the result."""
    tags = getattr(image, "tag_v2", None)
    if tags is None or not getattr(image, "tile", None):
        return *image.size, 1
    return tags.get(256, image.width), tags.get(257, image.height), tags.get(ExifTags.Base.Orientation, 1)


def _mend_tiff(image: Image.Image) -> None:
    """Have an uncompressed TIFF that lies on its side decoded in the shape it is stored in.

    Pillow takes the turned shape for it, and scrambles its pixels.
    """
    width, height, orientation = _tiff_layout(image)
    if orientation in _TURNS and image.size == (height, width) and image.tile[0][0] == "raw":  # type: ignore[attr-defined]
        image._size = (width, height)


def _orientation(image: Image.Image) -> int:
    """Return the orientation of the EXIF data, 1 to 8; 1 for none, one out of range, or unreadable data."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of damaged EXIF data: SyntaxError, struct.error, ValueError, ...; the pixels are whole
        return 1
    return found if isinstance(found, int) and found in _TURNS else 1


def _plain_png(image: Image.Image) -> bool:
    """Return True for a PNG that holds no orientation; Pillow would decode all of it to find out."""
    file = getattr(image, "fp", None)
    if image.format != "PNG" or "exif" in image.info or file is None or file.closed:
        return False
    position = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(position)
    return not any(word in content for word in _PNG_EXIF)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a grey image of 16-bit integers as L, or as LA if one of its values is transparent."""
    values = np.asarray(image).astype(np.int64)  # [H, W]
    top, known, inverted = 65535, image.format in ("PPM", "JPEG2000"), False  # these two are scaled by Pillow
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        bits = tags.get(258, (16,))[0]
        top, known, inverted = 2**bits - 1, bits != 16, tags.get(262) == _WHITE_IS_ZERO
    most = int(values.max())
    if not known and 0 < most < _LEAST_TOP:
        raise DataError(
            f"its grey values have 16 bits (mode {image.mode}) but none is above {most}, so they may be 10- or 12-bit "
            "ones; scale them to 0..65535, or save it with 8 bits"
        )
    scaled = np.clip((values * 255 + top // 2) // top, 0, 255).astype(np.uint8)
    grey = Image.fromarray(255 - scaled if inverted else scaled)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _may_be_clear(image: Image.Image) -> bool:
    """Return True if an image has transparency. (Pillow's has_transparency_data fails for palettes of an ICNS.)"""
    if image.mode == "P":
        palette = image.palette.mode if image.palette is not None else ""
        return "transparency" in image.info or palette.endswith("A")
    # What was converted to RGB keeps a colour that may be that of opaque pixels as well; only a file's own is exact.
    keyed = image.mode in ("1", "L", "RGB") and "transparency" in image.info and image.format is not None
    return image.mode in ("LA", "PA", "RGBA") or keyed


def _flat(image: Image.Image, raw: str, background: str) -> Image.Image:
    """Return an 8-bit image of any mode as RGB."""
    if image.mode in ("La", "RGBa"):  # colours multiplied by their alpha
        image = image.convert(image.mode.upper())
    if background == "drop" or not _may_be_clear(image):
        return image.convert("RGB")
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and (raw.startswith("RGB;16") or max(clear) > 255):
        raise DataError("a transparent colour in 16 bits cannot be told from its neighbours; save it with 8 bits")
    if isinstance(clear, int) and raw in ("L;2", "L;4"):  # Pillow scales the pixels, but not the transparent level
        image = image.copy()
        image.info["transparency"] = clear * (85 if raw == "L;2" else 17)
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
