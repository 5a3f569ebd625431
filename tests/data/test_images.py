from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinyllava_fast.config.schema import AugmentConfig
from tinyllava_fast.data.augment import augment
from tinyllava_fast.data.images import load_image, pixel_shape, to_pixels
from tinyllava_fast.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden"
PIXELS = np.load(GOLDEN / "pixels.npz")
KEYS = [k for k in PIXELS if not (k.startswith("row3") and k.endswith("square"))]  # the reference misreads that one


def make(name, **changes):
    import transformers

    settings = json.loads((GOLDEN / "pixels_processors.json").read_text())[name]
    kind = getattr(transformers, settings["image_processor_type"] + "Pil")
    return kind(**{k: v for k, v in settings.items() if not k.startswith("_")} | changes)


def picture(name):
    return load_image(GOLDEN / "pixels" / f"{name}.png")


def test_all_vectors_are_here():
    assert len(KEYS) == 48


@pytest.mark.parametrize("key", KEYS)
def test_golden(key):
    image, processor, mode = key.split(".")
    found = to_pixels([picture(image)], make(processor), mode)
    assert found.shape == (1, *PIXELS[key].shape) and found.dtype.is_floating_point
    np.testing.assert_allclose(found[0].numpy(), PIXELS[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2"])
@pytest.mark.parametrize("height", [1, 3])
def test_flat_images_are_not_taken_for_channel_first(name, height):
    """Rows of one colour must stay that colour: a mix-up of the axes would stripe them."""
    processor = make(name)
    image = Image.new("RGB", (90, height), (200, 30, 90))
    expected = (np.array([200, 30, 90]) / 255 - processor.image_mean) / processor.image_std
    found = to_pixels([image], processor)[0].numpy()
    np.testing.assert_allclose(found, np.broadcast_to(expected[:, None, None], found.shape), atol=1e-5)


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2"])
def test_the_table_equals_the_processor(name):
    processor = make(name)
    for key in ("wide", "tall", "gradient", "exact56"):
        expected = processor(picture(key), return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(to_pixels([picture(key)], processor).numpy(), expected)


def test_other_processors_are_called():
    processor = make("siglip", do_normalize=False)
    found = to_pixels([picture("wide")] * 2, processor)
    np.testing.assert_array_equal(found[0], processor(picture("wide"), return_tensors="np")["pixel_values"][0])
    small = make("clip", size={"shortest_edge": 40})  # the crop pads
    np.testing.assert_array_equal(
        to_pixels([picture("wide")], small)[0], small(picture("wide"), return_tensors="np")["pixel_values"][0]
    )
    assert to_pixels([], small).shape == (0, 3, 56, 56) == (0, *pixel_shape(small))


def test_modes_are_read_as_rgb_and_bad_files_are_named(tmp_path):
    assert {load_image(p).mode for p in (GOLDEN / "pixels").glob("*.png")} == {"RGB"}
    with pytest.raises(DataError, match=r"none.png: image file is missing; check the record's 'image'"):
        load_image(tmp_path / "none.png")
    whole = (GOLDEN / "pixels" / "wide.png").read_bytes()
    for name, content in {"cut": whole[: len(whole) // 2], "text": b"not an image", "empty": b""}.items():
        (tmp_path / f"{name}.png").write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}.png: truncated or not an image.*on_bad_image=skip"):
            load_image(tmp_path / f"{name}.png")


def blob():
    """A white 64x64 picture with a black square whose centre is at (20, 40)."""
    image = Image.new("RGB", (64, 64), (250, 240, 230))
    image.paste((0, 0, 0), (16, 36, 25, 45))
    return image


def centre(image):
    dark = np.argwhere(np.asarray(image.convert("L")) < 100)
    return (dark.mean(0)[::-1] + 0.5).tolist(), len(dark)


def test_augment_is_seeded_and_off_by_default():
    image = blob()
    assert augment(image, AugmentConfig(), (0, 0, 0)) is image
    config = AugmentConfig(hflip=0.5, vflip=0.5, shift=0.1, scale=0.2, rotate=20)
    first = [np.asarray(augment(image, config, (1, 2, i))) for i in range(8)]
    again = [np.asarray(augment(image, config, (1, 2, i))) for i in range(8)]
    np.testing.assert_array_equal(first, again)
    assert len({a.tobytes() for a in first}) == 8
    assert np.asarray(augment(image, config, (1, 3, 0))).tobytes() != first[0].tobytes()


def test_flips_alone_move_no_pixel_otherwise():
    image = blob()
    both = augment(image, AugmentConfig(hflip=1.0, vflip=1.0), (0,))
    np.testing.assert_array_equal(np.asarray(both), np.asarray(image)[::-1, ::-1])


def test_geometry_and_border_colour():
    image = blob()
    (x, y), area = centre(image)
    assert (x, y) == (20.5, 40.5)
    for seed in range(6):
        (moved_x, moved_y), moved = centre(augment(image, AugmentConfig(shift=0.1), (seed,)))
        assert abs(moved_x - x) <= 7 and abs(moved_y - y) <= 7 and abs(moved - area) < 15
        (scaled_x, scaled_y), scaled = centre(augment(image, AugmentConfig(scale=0.3), (seed,)))
        grow = (scaled / area) ** 0.5
        assert 0.65 < grow < 1.35
        assert abs(scaled_x - 32 - grow * (x - 32)) < 1.2 and abs(scaled_y - 32 - grow * (y - 32)) < 1.2
        turned = augment(image, AugmentConfig(rotate=45), (seed,))
        (turned_x, turned_y), _ = centre(turned)
        assert abs(np.hypot(turned_x - 32, turned_y - 32) - np.hypot(x - 32, y - 32)) < 0.7
        assert turned.getpixel((0, 0)) == (250, 240, 230)  # uncovered corners take the frame's colour


def test_keep_inside_never_cuts_the_content():
    image = Image.new("RGB", (64, 48), (240, 240, 240))
    image.paste((255, 0, 0), (40, 6, 60, 20))
    config = AugmentConfig(shift=1.0, scale=0.5, keep_inside=True)
    boxes = set()
    for i in range(60):
        red = np.asarray(augment(image, config, (i,)))[..., 1] < 120
        rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
        boxes.add((int(columns[0]), int(rows[0])))
        scale = len(columns) / 20
        assert 0.45 < scale < 1.6 and abs(len(rows) - 14 * scale) < 2.5  # whole, and not stretched
    assert len(boxes) > 40
    plain = Image.new("RGB", (8, 8), (9, 9, 9))
    assert augment(plain, config, (0,)).tobytes() == plain.tobytes()
