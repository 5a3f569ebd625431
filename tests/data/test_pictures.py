"""Every mode, format and orientation that Pillow can write, against pixels computed here."""

from __future__ import annotations

import struct
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.data.picture_files import HEIGHT, RAMP, WIDTH, png, tiff, turned
from tests.vectors import GOLDEN
from tinyllava_fast.data.images import image_size, load_image
from tinyllava_fast.data.pictures import REFERENCE, UPRIGHT, PictureReading, of_object
from tinyllava_fast.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pytest shows even those that the package silences
Image.init()
READINGS = [PictureReading(o, b) for o in ("upright", "stored") for b in ("white", "drop")]
MODES = (
    "1 L LA P PA RGB RGBA RGBX CMYK YCbCr LAB HSV I F I;16 I;16L I;16B I;16N La RGBa P+bytes P+index L+level".split()
)
WRITTEN = sorted(set(Image.SAVE) - {"PDF", "EPS", "WMF", "GRIB", "BUFR", "HDF5", "PALM", "IM", "SPIDER"})
LOSSY = {"JPEG": 20, "MPO": 20, "WEBP": 24, "AVIF": 20, "GIF": 8}  # levels that writing may cost
UNLIKE = ("HSV", "LAB", "1", "P+bytes", "P+index", "L+level", "I")  # what Pillow writes of these is another picture
ALPHA = np.where(np.arange(HEIGHT)[:, None] < HEIGHT // 2, 255, 0).astype(np.uint8).repeat(WIDTH, 1)  # clear below


def sample(mode):
    """A picture of a mode: a grey ramp; where the mode knows transparency, its lower half is clear."""
    grey, alpha = Image.fromarray(RAMP), Image.fromarray(ALPHA)
    if mode in ("La", "RGBa"):
        return sample(mode.upper()).convert(mode)
    if mode in ("LA", "RGBA"):
        image = grey.convert(mode)
        image.putalpha(alpha)
        return image
    if mode == "PA":
        image = grey.convert("P").convert("PA")
        image.putalpha(alpha)
        return image
    if mode in ("P+bytes", "P+index", "L+level"):
        image = grey.convert("L" if mode == "L+level" else "P", dither=Image.Dither.NONE)
        image.info["transparency"] = bytes([0, 128, 255]) if mode == "P+bytes" else 0
        return image
    if mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        values = RAMP.astype(np.uint16) * 257
        return Image.frombytes(mode, (WIDTH, HEIGHT), values.astype(">u2" if mode[-1] == "B" else "<u2").tobytes())
    if mode == "LAB":
        return Image.merge("LAB", (grey, Image.new("L", grey.size, 0), Image.new("L", grey.size, 0)))
    if mode in ("YCbCr", "HSV", "CMYK"):
        return grey.convert("RGB").convert(mode)
    return grey.convert(mode)


def composed(image, background):
    """The picture as [H, W, 3] floats by arithmetic on its own RGBA values; None: it must be refused."""
    if image.mode in ("F", "I"):
        return None
    if image.mode.startswith("I;"):
        level = np.asarray(image).astype(np.float64) / 257
        return np.stack([level] * 3, 2)
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.mode == "LAB":
        image = image.convert("RGB")
    if background == "drop":
        return np.asarray(image.convert("RGB"), np.float64)
    rgba = np.asarray(image.convert("RGBA"), np.float64)
    return rgba[:, :, :3] * rgba[:, :, 3:] / 255 + 255 - rgba[:, :, 3:]


def written(image, kind, path, orientation=1):
    """Whether Pillow writes the picture so, with its transparency and an orientation; False where it does not."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"exif": exif} if orientation > 1 else {}
    if "transparency" in image.info and kind in ("PNG", "GIF"):
        settings["transparency"] = image.info["transparency"]
    try:
        image.save(path, kind, **settings)
        with warnings.catch_warnings(), Image.open(path) as again:
            warnings.simplefilter("ignore")
            return again.size == image.size or orientation > 4 or kind in ("ICNS", "ICO")
    except (OSError, KeyError, ValueError, SystemError, TypeError, AttributeError):
        return False


@pytest.mark.parametrize("kind", WRITTEN)
def test_every_mode_in_every_format(kind, tmp_path):
    path = tmp_path / f"picture.{kind.lower()}"
    modes = [mode for mode in (MODES if kind != "ICNS" else ("P", "I;16")) if written(sample(mode), kind, path)]
    assert modes
    for mode in modes:
        assert written(sample(mode), kind, path)
        for reading in READINGS:
            check_reading(mode, kind, path, reading)


def check_reading(mode, kind, path, reading):
    with Image.open(path) as file:
        file.load()
        stored = file.mode
        refused = stored == "F" or (stored == "I" and kind != "PPM")
        expected = None if stored in ("F", "I") else composed(file, reading.background)
    if refused:
        with pytest.raises(DataError, match=rf"picture.{kind.lower()}: its pixels are .*mode {stored}"):
            load_image(path, reading)
        return
    found = np.asarray(load_image(path, reading), np.float64)
    if expected is not None:
        assert np.abs(found - expected).max() <= 1, (mode, reading)
    if mode not in UNLIKE and kind not in ("ICNS", "ICO", "BLP") and not (mode[:2] == "I;" and stored[:1] != "I"):
        upper = found[: HEIGHT // 2 - 2]
        slack = LOSSY.get(kind, 2) + 3 * ("P" in mode)
        assert np.abs(upper - RAMP[: len(upper), :, None]).max() <= slack, f"{mode}: not the picture that was written"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation(kind, orientation, tmp_path):
    modes = [m for m in ("L", "RGB", "RGBA", "P+index", "I;16", "CMYK") if written(sample(m), kind, tmp_path / "plain")]
    for mode in modes:
        check_orientation(mode, kind, orientation, tmp_path)
    assert "RGB" in modes


def check_orientation(mode, kind, orientation, folder):
    assert written(sample(mode), kind, folder / "plain")
    assert written(sample(mode), kind, folder / "picture", orientation)
    with Image.open(folder / "plain") as file:
        stored = composed(file, "white")
    for reading in (UPRIGHT, PictureReading("stored", "white")):
        turns = reading.orientation == "upright" or kind == "TIFF"  # which Pillow turns itself
        expected = turned(stored, orientation) if turns else stored
        found = load_image(folder / "picture", reading)
        assert np.abs(np.asarray(found, np.float64) - expected).max() <= 1, (mode, reading)
        assert found.size == image_size(folder / "picture", reading)
        with Image.open(folder / "picture") as file:
            assert of_object(file, reading).tobytes() == found.tobytes()
        if kind != "TIFF":  # which Pillow scrambles if it loads it, is uncompressed and lies on its side
            with Image.open(folder / "picture") as file:
                file.load()
                assert of_object(file, reading).tobytes() == found.tobytes()
    if mode == "RGB" and kind != "TIFF":
        with Image.open(folder / "picture") as file:
            assert load_image(folder / "picture").tobytes() == ImageOps.exif_transpose(file).tobytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("background", ["white", "drop"])
def test_image_objects_of_every_mode(mode, background):
    image = sample(mode)
    expected = composed(image, "drop" if mode == "L+level" else background)
    if expected is None:
        with pytest.raises(DataError, match=rf"the image object: its pixels are .*mode {mode}"):
            of_object(image, PictureReading("upright", background))
        return
    found = np.asarray(of_object(image, PictureReading("upright", background)), np.float64)
    assert np.abs(found - expected).max() <= 1
    if background == "white" and mode in ("LA", "PA", "RGBA", "La", "RGBa"):
        assert (found[HEIGHT // 2 :] == 255).all() and (found[: HEIGHT // 2, 0] == 0).all()


def test_what_was_converted_to_rgb_stays_as_it_is(tmp_path):
    """Pillow notes the clear colour in the result, also where opaque pixels have it."""
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 0, 0, 0, 90, 90, 90])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "a.png", transparency=0)
    with Image.open(tmp_path / "a.png") as file:
        converted = file.convert("RGB")
        assert np.asarray(of_object(file, UPRIGHT))[0, :, 0].tolist() == [255, 0, 90]
    assert converted.info["transparency"] == (0, 0, 0)
    assert np.asarray(of_object(converted, UPRIGHT))[0, :, 0].tolist() == [0, 0, 90]


def test_the_reference_reading_is_convert_rgb():
    for mode in MODES:
        image = sample(mode)
        if mode not in ("La", "I", "F") and not mode.startswith("I;"):
            expected = image.convert("RGBA" if mode == "RGBa" else "RGB").convert("RGB")
            assert of_object(image, REFERENCE).tobytes() == expected.tobytes(), mode


def test_sixteen_bits_are_scaled(tmp_path):
    ramp = np.arange(0, 65536, 257 * 3, dtype=np.uint16)[None].repeat(2, 0)
    expected = (ramp // 257).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp).save(tmp_path / "a.tif")
    Image.fromarray(ramp).save(tmp_path / "a.pgm")
    (tmp_path / "big.tif").write_bytes(tiff((*ramp.shape, ramp.astype(">u2").tobytes()), bits=16, order=">"))
    for name in ("a.png", "a.tif", "a.pgm", "big.tif"):
        for reading in READINGS:
            found = np.asarray(load_image(tmp_path / name, reading))
            np.testing.assert_array_equal(found, np.stack([expected] * 3, 2), err_msg=name)
    odd = np.array([[0, 128, 129, 385, 386, 65535]], np.uint16)  # 385 / 257 = 1.498, 386 / 257 = 1.502
    Image.fromarray(odd).save(tmp_path / "odd.png")
    assert np.asarray(load_image(tmp_path / "odd.png"))[0, :, 0].tolist() == [0, 0, 1, 1, 2, 255]


def test_white_is_zero_and_twelve_bits_of_a_tiff(tmp_path):
    ramp = np.arange(0, 65536, 257 * 15, dtype=np.uint16)[None].repeat(2, 0)
    (tmp_path / "a.tif").write_bytes(tiff((*ramp.shape, ramp.tobytes()), bits=16, white_is_zero=True))
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.tif"))[:, :, 0], 255 - ramp // 257)
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in [(0, 4095), (2048, 16)] * 2)
    (tmp_path / "b.tif").write_bytes(tiff((2, 4, packed), bits=12))
    assert np.asarray(load_image(tmp_path / "b.tif"))[0, :, 0].tolist() == [0, 255, 128, 1]


@pytest.mark.parametrize("most", [1, 1023, 4095])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_ten_and_twelve_bits_in_sixteen_are_refused(most, suffix, tmp_path):
    ramp = np.linspace(0, most, 64).astype(np.uint16)[None].repeat(8, 0)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(ramp).save(path)
    with pytest.raises(DataError, match=rf"a.{suffix}: its grey values have 16 bits .* none is above {most}, .*scale"):
        load_image(path)
    Image.fromarray(ramp * 0).save(path)
    assert np.asarray(load_image(path)).max() == 0
    deep = tmp_path / "a.pgm"  # it names its largest value, so nothing is uncertain
    deep.write_bytes(b"P5 64 8 %d\n" % max(most, 256) + ramp.astype(">u2").tobytes())
    found = np.asarray(load_image(deep))[0, :, 0]
    assert np.abs(found - ramp[0] * 255.0 / max(most, 256)).max() <= 1


def test_transparent_levels(tmp_path):
    """tRNS names a level in the file's own depth."""
    path = tmp_path / "a.png"
    white, black = [255] * 3, [0] * 3
    for depth, row, clear in (
        (16, b"\0\0\x80\0\xff\xff", 0),
        (8, b"\0\x80\xff", 0),
        (4, b"\x58\xf0", 5),
        (2, b"\x6c", 1),
    ):
        path.write_bytes(png(3, 1, depth, 0, [row], (b"tRNS", struct.pack(">H", clear))))
        assert np.asarray(load_image(path))[0, 0].tolist() == white, depth
        dropped = np.asarray(load_image(path, REFERENCE))[0, :, 0].tolist()
        assert np.asarray(load_image(path))[0, 1:, 0].tolist() == dropped[1:] and dropped[0] < 90, depth
    path.write_bytes(png(2, 1, 1, 0, [b"\x40"], (b"tRNS", struct.pack(">H", 0))))
    assert np.asarray(load_image(path))[0].tolist() == [white, white]
    path.write_bytes(png(2, 1, 8, 2, [b"\1\2\3\0\0\0"], (b"tRNS", struct.pack(">HHH", 1, 2, 3))))
    assert np.asarray(load_image(path))[0].tolist() == [white, black]
    path.write_bytes(png(1, 1, 16, 2, [b"\0\1\0\2\0\3"], (b"tRNS", struct.pack(">HHH", 1, 2, 3))))
    with pytest.raises(DataError, match="a transparent colour in 16 bits"):
        load_image(path)
    assert load_image(path, REFERENCE).size == (1, 1)


def test_sixteen_bit_colour_and_alpha(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(2, 1, 16, 6, [struct.pack(">8H", 65535, 0, 257, 65535, 65535, 0, 257, 0)]))
    assert np.asarray(load_image(path))[0].tolist() == [[255, 0, 1], [255, 255, 255]]
    assert np.asarray(load_image(path, REFERENCE))[0].tolist() == [[255, 0, 1], [255, 0, 1]]
    path.write_bytes(png(2, 1, 16, 4, [struct.pack(">4H", 257 * 9, 65535, 257 * 9, 0)]))
    assert np.asarray(load_image(path))[0, :, 0].tolist() == [9, 255]


@pytest.mark.parametrize("values", [[0.0, 1.0], [0.0, 255.0], [0.0, float("nan")], [-1.0, float("inf")]])
def test_floats_are_refused_by_mode(values, tmp_path):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(
        DataError, match=r"a.tif: its pixels are floating-point numbers \(mode F\).*save it with 8 bits"
    ):
        load_image(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"mode F"):
        image_size(tmp_path / "a.tif")


# Frames, EXIF, names and files of every other kind
@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_frame_is_seen(kind, tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:], lossless=True)
    found = np.asarray(load_image(tmp_path / "a")).reshape(-1, 3)
    assert np.abs(found.mean(0) - [255, 0, 0]).max() < 6


def test_golden_pictures_are_read_as_rgb():
    folder = GOLDEN / "pixels"
    assert {load_image(p).mode for p in folder.glob("*.png")} == {"RGB"}
