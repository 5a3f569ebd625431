from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.vectors import GOLDEN
from tinyllava_fast.config.augment import AugmentConfig
from tinyllava_fast.data import images
from tinyllava_fast.data.augment import augment
from tinyllava_fast.data.images import (
    check_shape,
    levels_table,
    load_image,
    normalized,
    pixel_shape,
    to_levels,
    to_pixels,
)
from tinyllava_fast.data.pictures import REFERENCE
from tinyllava_fast.errors import DataError

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
    found = to_pixels([load_image(GOLDEN / "pixels" / f"{image}.png", REFERENCE)], make(processor), mode)
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


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2"])
def test_levels_become_the_same_pixels_on_every_device(name):
    """_looked_up is the way of a GPU."""
    processor = make(name)
    levels, table = to_levels([picture("wide"), picture("gradient")], processor), levels_table(processor)
    assert levels.dtype == torch.uint8 and table.shape == (3, 256)
    assert torch.equal(images._looked_up(levels, table), normalized(levels, table))
    assert torch.equal(normalized(levels, table), to_pixels([picture("wide"), picture("gradient")], processor))
    for none in (levels[:0], to_levels([], processor)):
        assert images._looked_up(none, table).shape == normalized(none, table).shape == (0, *levels.shape[1:])


def test_other_processors_are_called():
    processor = make("siglip", do_normalize=False)
    found = to_pixels([picture("wide")] * 2, processor)
    np.testing.assert_array_equal(found[0], processor(picture("wide"), return_tensors="np")["pixel_values"][0])
    small = make("clip", size={"shortest_edge": 40})  # the crop pads
    np.testing.assert_array_equal(
        to_pixels([picture("wide")], small)[0], small(picture("wide"), return_tensors="np")["pixel_values"][0]
    )
    assert to_pixels([], small).shape == (0, 3, 56, 56) == (0, *pixel_shape(small))


def noise(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["square", "pad"])
@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2"])
@pytest.mark.parametrize("size", [(600, 40), (40, 600), (601, 7), (3, 500), (700, 2), (1, 701), (97, 96)])
def test_the_way_for_lines_equals_the_reference_for_ordinary_pictures(name, size, mode, monkeypatch):
    """Taken where the plain way needs gigabytes; at most one level of 255 apart, by another order of two passes."""
    processor, image = make(name), noise(*size)
    expected = to_pixels([image], processor, mode)
    monkeypatch.setattr(images, "MOST_PIXELS", 100)
    apart = np.abs((to_pixels([image], processor, mode) - expected).numpy())
    levels = apart * np.array(processor.image_std)[:, None, None] * 255
    assert levels.max() <= 1.01 and (levels > 0.5).mean() < 0.02


@pytest.mark.parametrize("size", [(40000, 1), (1, 40000), (30000, 2), (2, 30000), (60000, 900)])
@pytest.mark.parametrize(("name", "mode"), [("siglip", "pad"), ("clip", "square"), ("dinov2", "pad")])
def test_lines_need_little_memory(name, mode, size):
    resource = pytest.importorskip("resource")
    image = Image.new("RGB", size, (200, 30, 90))
    most = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**30, most[1]))
    try:
        pixels = to_pixels([image], make(name), mode)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, most)
    assert pixels.isfinite().all() and pixels.shape[0] == 1


def test_lines_that_a_processor_cannot_take_are_refused():
    other = make("clip", do_normalize=False)
    with pytest.raises(DataError, match=r"a picture of 30000 x 2 pixels is too much like a line: .*; crop it"):
        check_shape(Image.new("RGB", (30000, 2)), other, "pad")
    with pytest.raises(DataError, match="like a line"):
        check_shape(Image.new("RGB", (2, 300_000)), other, "square")
    check_shape(Image.new("RGB", (300, 200)), other, "pad")
    check_shape(Image.new("RGB", (30000, 2)), make("clip"), "pad")


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
