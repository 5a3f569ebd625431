"""Pictures as files and as bytes, of a colour each."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from tinyllava_fast.data.formats._base import base_of
from tinyllava_fast.data.formats._embedded import picture_of
from tinyllava_fast.data.images import load_image


def _picture(level, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (level, level, level)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def picture():
    """The bytes of a picture of a grey level."""
    return _picture


@pytest.fixture
def levels():
    """Returns the grey level of each image of a record."""

    def read(source, record, folder="."):
        pictures = [picture_of(image, str(folder), base_of(source)) for image in record.images]
        return [load_image(one).getpixel((0, 0))[0] for one in pictures]

    return read
