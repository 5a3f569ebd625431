from __future__ import annotations

import zlib

import pytest

from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.train.checksums import MANIFEST, Checksum, first_difference, manifest, read_manifest


def test_a_checksum_is_that_of_all_bytes_however_they_come(tmp_path):
    content = bytes(range(256)) * 40_000  # more than one piece of a file
    expected = Checksum(len(content), f"{zlib.crc32(content):08x}")
    assert Checksum().plus(content) == expected
    parts = Checksum().plus(content[:7]).plus(memoryview(content[7:])).plus(b"")
    (tmp_path / "file").write_bytes(content)
    assert parts == expected == Checksum.of_file(tmp_path / "file")


def write(folder, **files: bytes) -> dict[str, Checksum]:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {name: Checksum().plus(content) for name, content in files.items()}


def test_what_was_written_is_read_and_found_to_be_the_same(tmp_path):
    files = write(tmp_path, a=b"one", b=b"", c=b"x" * 5_000_000)
    (tmp_path / MANIFEST).write_bytes(manifest(files))
    assert read_manifest(tmp_path) == files and first_difference(tmp_path, files) == ""


def test_a_folder_without_checksums_is_an_older_one(tmp_path):
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"onf", "b: damaged: its checksum is"), (b"on", "b: truncated or damaged: it has 2 bytes, 3 were written")],
)
def test_the_file_that_changed_is_named(tmp_path, content, said):
    files = write(tmp_path, a=b"same", b=b"one")
    (tmp_path / "b").write_bytes(content)
    assert said in first_difference(tmp_path, files)
    (tmp_path / "b").unlink()
    assert first_difference(tmp_path, files) == f"{tmp_path / 'b'}: missing"


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"files": {"a": 3}}', b'{"files": {"a": {"size": -1, "crc32": "0"}}}']
)
def test_checksums_that_cannot_be_read_are_named(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checksums\.json"):
        read_manifest(tmp_path)
