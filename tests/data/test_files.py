"""What is remembered of image files between two starts."""

from __future__ import annotations

import os

import pytest
from PIL import Image

from tinyllava_fast.data import files, shelf
from tinyllava_fast.errors import DataError


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """Headers are remembered, of however few files; the folder of what is kept."""
    monkeypatch.setenv("TLF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(shelf.LIMIT, "1")
    monkeypatch.setattr(files, "_MANY", 1)
    monkeypatch.setattr(files, "_PART", 5)
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def opened(monkeypatch):
    """The names of the files whose headers are read, in this process."""
    names = []
    measure = files.image_size
    monkeypatch.setattr(files, "cores", lambda: 1)
    monkeypatch.setattr(
        files, "image_size", lambda path, reading: names.append(os.path.basename(path)) or measure(path, reading)
    )
    return names


def needs(dataset):
    return [column.tolist() for column in (dataset.lengths, dataset.images, dataset.segments)]


@pytest.mark.parametrize(
    "settings", [{}, {"image_mode": "anyres", "max_images": 40, "tokens": 2000}], ids=["square", "anyres"]
)
def test_a_header_is_read_once(make, opened, folder, settings):
    first = make(**settings)
    assert len(opened) == 16
    again = make(**settings)
    assert len(opened) == 16 and needs(first) == needs(again)
    Image.new("RGB", (50, 90)).save(folder / "images" / "1.png")
    os.utime(folder / "images" / "2.png", ns=(1, 1))
    changed = make(**settings)
    assert sorted(opened[16:]) == ["1.png", "2.png"]
    assert (needs(changed) == needs(first)) == (not settings)
    make(**settings)
    assert len(opened) == 18


def test_faults_are_found_again_at_every_start(make, folder, opened):
    make()
    content = (folder / "images" / "1.png").read_bytes()
    (folder / "images" / "1.png").write_bytes(b"x" * len(content))
    os.remove(folder / "images" / "4.png")
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"(?s)1 records name a missing image.*4.png.*1 records name an image that.*1.png"
        ):
            make()
    (folder / "images" / "4.png").write_bytes(content)
    for _ in range(2):
        assert len(make(on_bad_image="skip").skipped) == 1
    (folder / "images" / "1.png").write_bytes(content)
    assert make().skipped == []


def test_processes_find_what_one_finds(make, folder, monkeypatch):
    (folder / "images" / "7.png").write_bytes(b"<html>")
    (folder / "images" / "8.png").unlink()
    with pytest.raises(DataError) as alone:
        make()
    monkeypatch.setattr(files, "cores", lambda: 2)
    with pytest.raises(DataError) as several:
        make()
    assert str(several.value) == str(alone.value) and "a web page" in str(alone.value)


def test_another_folder_is_looked_at_anew(make, folder, opened):
    make()
    os.rename(folder / "images", folder / "moved")
    with pytest.raises(DataError, match="16 records name a missing image file"):
        make()
    make(image_folder=str(folder / "moved"))
    assert len(opened) == 32
