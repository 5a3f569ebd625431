"""Files and objects that are odd, damaged or no pictures: the right pixels, or a sentence that names them."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.data.picture_files import HEIGHT, RAMP, WIDTH, png, turned
from tinyllava_fast.data.images import image_size, load_image
from tinyllava_fast.data.pictures import REFERENCE, UPRIGHT, of_object
from tinyllava_fast.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pytest shows even those that the package silences


def jpeg(exif=b""):
    content = io.BytesIO()
    Image.fromarray(np.stack([RAMP] * 3, 2)).save(content, "JPEG", quality=95, exif=exif)
    return content.getvalue()


def exif_of(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


@pytest.mark.parametrize(
    "exif",
    [
        exif_of(0),
        exif_of(9),
        exif_of(65535),
        exif_of(6)[:-14],
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0junk" * 9,
    ],
    ids=range(7),
)
def test_orientations_out_of_range_and_damaged_exif_turn_nothing(exif, tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(exif))
    assert load_image(path).size == image_size(path, UPRIGHT) == (WIDTH, HEIGHT)
    assert load_image(path).tobytes() == load_image(path, REFERENCE).tobytes()


def test_exif_behind_the_pixels_of_a_png_and_in_xmp(tmp_path):
    image, path = Image.fromarray(np.stack([RAMP] * 3, 2)), tmp_path / "a.png"
    image.save(path)
    plain = path.read_bytes()
    body = exif_of(6).removeprefix(b"Exif\0\0")
    late = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    path.write_bytes(plain[:-12] + late + plain[-12:])
    assert load_image(path).size == image_size(path, UPRIGHT) == (HEIGHT, WIDTH)
    assert image_size(path, REFERENCE) == (WIDTH, HEIGHT)
    image.save(tmp_path / "b.webp", xmp=b'<x tiff:Orientation="8"/>', lossless=True)
    expected = turned(np.asarray(image), 8)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "b.webp")), expected)


def test_names_of_every_kind(tmp_path):
    picture = Image.new("RGB", (8, 8), (9, 8, 7))
    for name in (
        "UPPER.JPG.PNG",
        "no_extension",
        "wrong.jpg",
        "ü ñ 图.png",
        "line\nbreak.png",
        os.fsdecode(b"raw\xff.png"),
    ):
        picture.save(tmp_path / name, "PNG")
        assert load_image(tmp_path / name).getpixel((0, 0)) == (9, 8, 7)
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match="empty") as error:
            load_image(str(tmp_path / name))
        str(error.value).encode()  # any terminal can write it


def bomb(width, height):
    return png(width, height, 8, 0, [b""])


def zip_bomb_text():
    body = b"k\0\0" + zlib.compress(bytes(2**27))
    return png(1, 1, 8, 0, [b"\0"], (b"zTXt", body))


def bad_files():
    whole = jpeg()
    yield "empty", b"", r"the file is empty \(0 bytes\)"
    yield "zeros", bytes(5000), "its first 1,024 bytes are zeros; was it copied in full"
    yield "html", b"\xef\xbb\xbf \n<!DOCTYPE HTML><html>", r"truncated or not an image: it is a web page \(HTML\)"
    yield "lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of git LFS.*git lfs pull"
    yield "annex", b"../.git/annex/objects/3f/x.jpg\n", "git annex get"
    yield "svg", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"
    yield "pdf", b"%PDF-1.7\n", "a PDF document; pictures of this kind are not opened: save it as PNG or JPEG"
    yield "eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript drawing"
    yield "wmf", b"\xd7\xcd\xc6\x9a\0\0" + bytes(99), "a Windows metafile"
    yield "emf", struct.pack("<I", 1) + bytes(36) + b" EMF" + bytes(99), "a Windows metafile"
    yield "hdf5", b"\x89HDF\r\n\x1a\n", "an HDF5 file"
    yield "fits", b"SIMPLE  =                    T".ljust(2880), "a FITS file"
    yield "heic", b"\0\0\0\x18ftypheic" + bytes(40), "HEIF|truncated"
    yield "mp4", b"\0\0\0\x18ftypisom" + bytes(40), "a video"
    yield "zip", b"PK\x03\x04" + bytes(40), "a ZIP archive"
    yield "npy", b"\x93NUMPY\1\0", "a NumPy array"
    yield "json", b'{"a": 1}', """it is a text that begins '{"a": 1}'"""
    yield "random", bytes(range(7, 250)), "truncated or not an image: its 243 bytes begin with 07 08 09"
    yield "cut", whole[: len(whole) // 2], "truncated or not an image"
    yield "header", whole[:30], "truncated or not an image"
    yield "signature", b"\x89PNG\r\n\x1a\n", "truncated or not an image"
    yield "crc", png(1, 1, 8, 0, [b"\0"]).replace(b"IHDR", b"IHDX"), "truncated or not an image"
    yield "bomb", bomb(60000, 60000), "a picture of 3,600,000,000 pixels is larger than 178,956,970"
    yield "text bomb", zip_bomb_text(), "truncated or not an image"
    yield "no pixels", b"GIF89a\0\0\0\0\0\0\0;", "image"


@pytest.mark.parametrize(("content", "message"), [c[1:] for c in bad_files()], ids=[c[0] for c in bad_files()])
def test_bad_files_are_named(content, message, tmp_path):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    for reading in (UPRIGHT, REFERENCE):
        with pytest.raises(DataError, match=rf"bad.png: .*({message})"):
            load_image(path, reading)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    found = {
        "pipe": "a pipe, socket or device",
        ".": "it is a folder",
        "loop": "cannot be opened: Too many levels of symbolic links",
        "dangling": "image file is missing",
        "gone": "image file is missing",
        "gone/a.png": "image file is missing",
        "a" * 300: "cannot be opened: File name too long",
        "nul\0.png": "cannot be opened: embedded null",
    }
    for name, message in found.items():
        with pytest.raises(DataError, match=message):
            load_image(f"{tmp_path}/{name}")
    with pytest.raises(DataError, match="/dev/zero: it is a pipe, socket or device"):
        load_image("/dev/zero")
    for url in ("https://host/cat.png", "s3://bucket/cat.png", "data:image/png;base64," + "A" * 9000):
        with pytest.raises(DataError, match="a URL; pictures are not downloaded") as error:
            load_image(url)
        assert len(str(error.value)) < 250
    with pytest.raises(DataError, match="''"):
        load_image("")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(DataError, match="no permission to read"):
        load_image(tmp_path / "a.png")


def test_no_other_program_is_started(tmp_path):
    """EPS would start Ghostscript: one that would leave a mark stands first in PATH."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    script = (
        "import sys; from PIL import Image; from tinyllava_fast.data.images import load_image\n"
        "from tinyllava_fast.data.pictures import of_object, UPRIGHT\n"
        "for read in (lambda p: load_image(p), lambda p: of_object(Image.open(p), UPRIGHT)):\n"
        "    try:\n        read(sys.argv[1])\n"
        "    except Exception as error:\n        print(type(error).__name__, error)\n"
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    run = [sys.executable, "-c", script, str(tmp_path / "a.png")]
    done = subprocess.run(run, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "a PostScript drawing" in lines[0] and "EPS pictures are not opened" in lines[1]
    assert [line.split()[0] for line in lines] == ["DataError"] * 2 and not (tmp_path / "started").exists()


def test_small_and_odd_good_files(tmp_path):
    path = tmp_path / "a"
    Image.new("RGB", (1, 1), (1, 2, 3)).save(path, "PNG")
    path.write_bytes(path.read_bytes() + b"trailing garbage")
    assert load_image(path).getpixel((0, 0)) == (1, 2, 3)
    Image.new("RGBA", (64, 64), (9, 9, 9, 255)).save(path, "ICO", sizes=[(16, 16), (64, 64)])
    assert load_image(path).size == (64, 64)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path, "JPEG", quality=95)  # Adobe's are stored inverted
    assert np.abs(np.asarray(load_image(path), int)[0, 0] - [255, 0, 0]).max() < 12
    Image.new("RGB", (8, 8), (7, 7, 7)).save(path, "TIFF", big_tiff=True)
    assert load_image(path).getpixel((0, 0)) == (7, 7, 7)
    half = Image.new("P", (2, 1))
    half.putpalette([255, 0, 0, 0, 0, 0])
    half.putpixel((1, 0), 1)
    half.save(path, "PNG", transparency=bytes([128, 255]))
    assert np.abs(np.asarray(load_image(path), int)[0] - [[255, 127, 127], [0, 0, 0]]).max() <= 1
    assert np.asarray(load_image(path, REFERENCE))[0].tolist() == [[255, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("image", [Image.new("RGB", (0, 0)), Image.new("L", (5, 0)), Image.new("RGBA", (0, 7))])
def test_objects_without_pixels_are_refused(image):
    with pytest.raises(DataError, match=rf"the image object: a picture of {image.width} x {image.height} pixels"):
        of_object(image, UPRIGHT)
