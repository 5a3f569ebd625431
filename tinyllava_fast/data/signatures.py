"""Name the kind of a file that is no picture by its first bytes, for messages that help."""

from __future__ import annotations

HEAD = 1024
_CONVERT = "pictures of this kind are not opened: save it as PNG or JPEG"
_STARTS = {
    b"version https://git-lfs": "a pointer of git LFS, not the picture itself; run git lfs pull",
    b"%PDF": f"a PDF document; {_CONVERT}",
    b"%!PS": f"a PostScript drawing; {_CONVERT}",
    b"\xc5\xd0\xd3\xc6": f"a PostScript drawing; {_CONVERT}",
    b"\xd7\xcd\xc6\x9a": f"a Windows metafile; {_CONVERT}",
    b"\x01\x00\x09\x00": f"a Windows metafile; {_CONVERT}",
    b"\x89HDF": f"an HDF5 file; {_CONVERT}",
    b"SIMPLE  =": f"a FITS file; {_CONVERT}",
    b"GRIB": f"a GRIB file; {_CONVERT}",
    b"BUFR": f"a BUFR file; {_CONVERT}",
    b"\x00\x00\x01\xba": f"a video; {_CONVERT}",
    b"\x00\x00\x01\xb3": f"a video; {_CONVERT}",
    b"\x1aE\xdf\xa3": f"a video; {_CONVERT}",
    b"\x93NUMPY": f"a NumPy array; {_CONVERT}",
    b"PK\x03\x04": "a ZIP archive, not a picture; unpack it",
    b"\x1f\x8b": "a gzip archive, not a picture; unpack it",
}
_HEIF = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis")


def what_it_is(head: bytes, size: int) -> str:
    """Return why content that Pillow does not know cannot be read, as the end of a sentence.

    head: its first HEAD bytes, or all there are. size: of the whole.
    """
    if not head:
        return "the file is empty (0 bytes)"
    if not head.strip(b"\x00"):
        return f"its first {len(head):,} bytes are zeros; was it copied in full?"
    for start, words in _STARTS.items():
        if head.startswith(start):
            return f"it is {words}"
    if head[4:8] == b"ftyp":
        kind = "an HEIF or AVIF picture that Pillow has no decoder for" if head[8:12] in _HEIF else "a video"
        return f"it is {kind}; {_CONVERT}"
    if head[40:44] == b" EMF":
        return f"it is a Windows metafile; {_CONVERT}"
    begins = f"its {size:,} bytes begin with {head[:8].hex(' ')}"
    return f"truncated or not an image: {_text(head) or begins}"


def _text(head: bytes) -> str:
    """Return the kind of a text; "" if it is none."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "it is a web page (HTML); was the download refused?"
    if b"<svg" in start:
        return f"it is an SVG drawing; {_CONVERT}"
    if b"/annex/objects/" in start[:300]:
        return "it is a pointer of git-annex, not the picture itself; run git annex get"
    try:
        line = head.decode("utf-8").strip().splitlines()[0]
    except (UnicodeDecodeError, IndexError):
        return ""
    return f"it is a text that begins {line[:40]!r}" if line.isprintable() else ""
