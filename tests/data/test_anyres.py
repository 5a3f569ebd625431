"""Tiles of an image, against transformers' processor of LLaVA-1.6 and by hand for towers without a crop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.image_processing_utils import select_best_resolution

from tinyllava_fast.data.anyres import best_resolution, count_inputs, resolve_grid, tile_size, tiles
from tinyllava_fast.data.images import image_size, to_pixels
from tinyllava_fast.errors import DataError, UserError

SIZES = [(14, 14), (60, 20), (20, 60), (400, 300), (300, 400), (1, 1), (1, 500), (500, 1), (31, 29), (90, 31)]


def clip(edge=14, crop=14):
    return CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": crop, "width": crop})


def siglip(size=16):
    return SiglipImageProcessorPil(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def picture(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@given(st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
def test_selection_is_that_of_llava(size):
    grid = resolve_grid([], siglip(384))
    flipped = [(h, w) for w, h in grid]
    height, width = select_best_resolution((size[1], size[0]), flipped)
    assert best_resolution(size, grid) == (width, height)


def test_default_grid():
    assert resolve_grid([], siglip(16)) == [(16, 32), (32, 16), (32, 32), (16, 48), (48, 16)]
    assert resolve_grid([], clip(18, 14)) == [(14, 28), (28, 14), (28, 28), (14, 42), (42, 14)]
    assert resolve_grid([(28, 14)], clip()) == [(28, 14)]
    for bad in ((15, 14), (14, 0), (-14, 14)):
        with pytest.raises(UserError, match=r"data.image_grid: \[.*\] is no multiple of the tower's \[14, 14\] pixels"):
            resolve_grid([(14, 28), bad], clip())


@pytest.mark.parametrize("size", SIZES)
def test_tiles_equal_llava_next(size):
    from transformers import LlavaNextImageProcessorPil

    processor, image = clip(), picture(size)
    grid = resolve_grid([], processor)
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": 14},
        crop_size={"height": 14, "width": 14},
        image_grid_pinpoints=[[h, w] for w, h in grid],
    )
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    ours = to_pixels(tiles(image, grid, processor), processor, "anyres")
    assert torch.equal(ours, expected)
    assert len(ours) == count_inputs(image.size, grid, tile_size(processor))


@pytest.mark.parametrize("processor,tile", [(siglip(16), 16), (clip(18, 14), 14)])
def test_tiles_by_hand(processor, tile):
    """An image of twice the tower's width fills the wide resolution exactly: tiles are its halves, left then right."""
    image = picture((2 * tile, tile))
    whole, left, right = tiles(image, resolve_grid([], processor), processor)
    assert whole.size == ((18, 18) if tile == 14 else (16, 16))  # what the processor resizes to
    assert np.array_equal(np.asarray(left), np.asarray(image)[:, :tile])
    assert np.array_equal(np.asarray(right), np.asarray(image)[:, tile:])
    square = picture((2 * tile, 2 * tile))
    parts = tiles(square, [(2 * tile, 2 * tile)], processor)[1:]
    corners = [np.asarray(square)[y : y + tile, x : x + tile] for y in (0, tile) for x in (0, tile)]
    assert all(np.array_equal(np.asarray(p), c) for p, c in zip(parts, corners, strict=True))
    pixels = to_pixels(parts, processor, "anyres")
    assert pixels.shape == (4, 3, tile, tile)
    assert torch.equal(pixels, to_pixels(parts, processor, "square"))


def test_the_enlarged_copy_is_centred_on_black():
    tall = Image.new("RGB", (10, 30), (255, 255, 255))
    parts = tiles(tall, [(32, 32)], siglip())
    top = np.hstack([np.asarray(part)[:, :, 0] for part in parts[1:3]])
    assert top.shape == (16, 32)
    assert np.array_equal(top, np.where((np.arange(32) >= 10) & (np.arange(32) < 21), 255, 0)[None].repeat(16, 0))


def test_sizes_come_from_the_header(tmp_path):
    path = tmp_path / "a.png"
    picture((40, 30)).save(path)
    path.write_bytes(path.read_bytes()[:60])  # the pixels are gone
    assert image_size(path) == (40, 30)
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a.png: truncated or not an image"):
        image_size(path)
    with pytest.raises(DataError, match=r"gone.png: image file is missing"):
        image_size(tmp_path / "gone.png")
