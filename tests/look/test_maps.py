"""Maps on pictures: masses in boxes, and where the tower's inputs lie in every mode."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tinyllava_fast.data.anyres import input_boxes, resolve_grid, tiles
from tinyllava_fast.data.images import seen_box, to_pixels
from tinyllava_fast.look.types import Map


def test_mass_is_shared_by_area() -> None:
    values = np.array([[[1.0, 2.0], [3.0, 4.0]]]) / 10
    found = Map(values, [(0.0, 0.0, 8.0, 4.0)], (8, 4))
    assert found.mass((0, 0, 8, 4)) == pytest.approx(1)
    assert found.mass((0, 0, 4, 2)) == pytest.approx(0.1)
    assert found.mass((2, 1, 6, 3)) == pytest.approx(0.25)
    assert np.allclose(found.raster(2, 2), values[0])
    assert np.allclose(found.raster(8, 4).sum(), 1)


def test_mass_on_padding_is_outside_the_picture() -> None:
    found = Map(np.full((1, 2, 2), 0.25), [(0.0, -2.0, 8.0, 6.0)], (8, 4))
    assert found.mass((0, 0, 8, 4)) == pytest.approx(0.5)
    two = Map(np.full((2, 2, 2), 0.125), [(0.0, 0.0, 8.0, 4.0), (0.0, 0.0, 4.0, 4.0)], (8, 4))
    assert two.mass((0, 0, 4, 4)) == pytest.approx(0.75)


CLIP = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 48, "width": 48})
SIGLIP = SiglipImageProcessorPil(size={"height": 48, "width": 48})


def places(size: tuple[int, int]) -> Image.Image:
    """A picture whose red and green are the place in it."""
    x, y = np.meshgrid((np.arange(size[0]) + 0.5) / size[0], (np.arange(size[1]) + 0.5) / size[1])
    return Image.fromarray((np.stack([x, y, 0 * x + 1], -1) * 255).round().astype(np.uint8))


@pytest.mark.parametrize("size", [(120, 80), (70, 150)], ids=["wide", "high"])
@pytest.mark.parametrize("mode", ["square", "pad", "anyres"])
@pytest.mark.parametrize("processor", [CLIP, SIGLIP], ids=["crops", "squeezes"])
def test_each_pixel_of_an_input_is_where_its_box_says(
    processor: CLIPImageProcessorPil, mode: str, size: tuple[int, int]
) -> None:
    picture = places(size)
    if mode == "anyres":
        grid = resolve_grid([], processor)
        inputs, boxes = tiles(picture, grid, processor), input_boxes(size, grid, processor)
    else:
        inputs, boxes = [picture], [seen_box(size, processor, mode)]
    pixels = to_pixels(inputs, processor, mode)
    mean, std = (np.array(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    for shown, (left, top, right, bottom) in zip(pixels.numpy() * std + mean, boxes, strict=True):
        side = shown.shape[-1]
        u = (left + (np.arange(side) + 0.5) / side * (right - left)) / size[0]
        v = (top + (np.arange(side) + 0.5) / side * (bottom - top)) / size[1]
        inside = (np.abs(u - 0.5) < 0.42)[None] & (np.abs(v - 0.5) < 0.42)[:, None]
        assert inside.any()
        assert np.abs(shown[0] - u[None])[inside].max() < 0.025
        assert np.abs(shown[1] - v[:, None])[inside].max() < 0.025
