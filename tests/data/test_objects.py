from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tinyllava_fast.data.objects import image_objects
from tinyllava_fast.data.pictures import UPRIGHT, of_object
from tinyllava_fast.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def content() -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


class Named:
    """A path of another kind."""

    def __fspath__(self) -> str:
        return "folder/a.png"


def test_paths_and_pil_images_stay_as_they_are():
    image = Image.fromarray(PIXELS)
    assert image_objects(None) is None and image_objects(image) is image
    assert image_objects("a.png") == "a.png" and image_objects(Path("a.png")) == Path("a.png")
    assert image_objects(Named()) == Path("folder/a.png")
    assert image_objects(["a.png", image]) == ("a.png", image) and image_objects([]) == ()


@pytest.mark.parametrize("kind", ["bytes", "bytearray", "memoryview", "BytesIO", "array", "opened"])
def test_what_holds_the_picture_gives_its_pixels(kind, tmp_path):
    data = content()
    (tmp_path / "a").write_bytes(data)
    with (tmp_path / "a").open("rb") as opened:
        value = {
            "bytes": data,
            "bytearray": bytearray(data),
            "memoryview": memoryview(data),
            "BytesIO": io.BytesIO(data),
            "array": PIXELS,
            "opened": opened,
        }[kind]
        found = image_objects(value)
    np.testing.assert_array_equal(np.asarray(of_object(found, UPRIGHT)), PIXELS)


def test_arrays():
    clear = np.dstack([PIXELS, np.zeros((6, 5), np.uint8)])
    for array, expected in (
        (PIXELS[:, :, 0], np.stack([PIXELS[:, :, 0]] * 3, 2)),
        (PIXELS[:, :, :1], np.stack([PIXELS[:, :, 0]] * 3, 2)),
        (clear, np.full_like(PIXELS, 255)),
        (PIXELS[::-1, ::2], PIXELS[::-1, ::2]),
        (PIXELS[:1, :1], PIXELS[:1, :1]),
    ):
        np.testing.assert_array_equal(np.asarray(of_object(image_objects(array), UPRIGHT)), expected)
    changing = PIXELS.copy()
    image = image_objects(changing)
    changing[:] = 0
    np.testing.assert_array_equal(np.asarray(image), PIXELS)


WRONG = [
    (PIXELS / 255, r"NumPy array of float64 \[6, 5, 3\] has no certain range; .*\(array \* 255\)"),
    (PIXELS.astype(np.int64), r"int64 \[6, 5, 3\] has no certain range; give uint8 of \[H, W, 3\]"),
    (PIXELS[:, :, 0] > 9, r"bool \[6, 5\] has no certain range"),
    (PIXELS.transpose(2, 0, 1), r"uint8 \[3, 6, 5\] is no picture; .*transpose\(1, 2, 0\)"),
    (PIXELS[None], r"uint8 \[1, 6, 5, 3\] is no picture"),
    (PIXELS[:, :, :2], r"uint8 \[6, 5, 2\] is no picture"),
    (PIXELS[:0], r"uint8 \[0, 5, 3\] shows nothing"),
    (np.array(["a.png"]), "is no picture"),
    (torch.zeros(3, 6, 5), r"a torch tensor of \[3, 6, 5\] says neither .*permute\(1, 2, 0\)"),
    (b"", r"the image of 0 bytes: the file is empty"),
    (b"<html>403</html>", r"the image of 16 bytes: .*a web page"),
    (b"%!PS-Adobe-3.0", "PostScript"),
    (io.StringIO("text"), "the file object gives str, not bytes; open the file with 'rb'"),
    (io.BytesIO(), r"nothing left to read; open it again, or seek\(0\) first"),
    (7, "the image: got int; give a path, a PIL image"),
    ({"a.png"}, "the image: got set; give a path"),
    ({"path": "a.png"}, "the image: got dict; give a path"),
    (["a.png", None], "image 1 of the list: got NoneType"),
    (["a.png", ["b.png"]], "image 1 of the list: got list"),
]


@pytest.mark.parametrize(("value", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_no_image_is_refused_in_one_short_sentence(value, message):
    with pytest.raises(DataError, match=message) as error:
        image_objects(value)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_closed_and_text_files_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(content())
    with (tmp_path / "a.png").open("rb") as file:
        pass
    with pytest.raises(DataError, match=r"cannot be read: .*closed"):
        image_objects(file)
    with (tmp_path / "a.png").open(encoding="utf-8") as text, pytest.raises(DataError, match="opened with 'rb'"):
        image_objects(text)
