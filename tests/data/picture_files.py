"""Pictures for tests: pixels that differ in every corner, and files byte by byte that Pillow does not write."""

from __future__ import annotations

import struct
import zlib

import numpy as np

WIDTH, HEIGHT = 24, 16
RAMP = np.linspace(0, 255, WIDTH).round().astype(np.uint8)[None].repeat(HEIGHT, 0)  # brighter to the right


def png(width, height, depth, colour, rows, *chunks):
    """A PNG of raw scan lines, with further chunks before the pixels."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    content = b"".join(b"\0" + row for row in rows)
    pixels = chunk(b"IDAT", zlib.compress(content))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", head), *(chunk(*c) for c in chunks), pixels, chunk(b"IEND", b"")]
    )


def tiff(values, *, bits, white_is_zero=False, order="<"):
    """A grey TIFF of raw bytes."""
    height, width, body = values
    entries = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, 0 if white_is_zero else 1)]
    entries += [(273, 4, 200), (277, 3, 1), (278, 3, height), (279, 4, len(body))]
    head = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(entries))
    for tag, kind, value in entries:
        packed = struct.pack(f"{order}{'H' if kind == 3 else 'I'}", value).ljust(4, b"\0")
        head += struct.pack(f"{order}HHI", tag, kind, 1) + packed
    return head.ljust(200, b"\0") + body


def turned(pixels, orientation):
    """What an observer sees of stored pixels, by the definition of the EXIF entry (row 0 is ..., column 0 is ...)."""
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: pixels[::-1].swapaxes(0, 1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: pixels[:, ::-1].swapaxes(0, 1),
    }[orientation]
