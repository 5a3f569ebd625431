"""An output that cannot be written is a sentence, not a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tinyllava_fast.errors import UserError, writing


def below_a_file(root: Path) -> Path:
    (root / "file").write_text("")
    path = root / "file" / "folder"
    path.mkdir(parents=True)
    return path


def at_a_file(root: Path) -> Path:
    path = root / "file"
    path.write_text("")
    path.mkdir(exist_ok=True)
    return path


def at_a_folder(root: Path) -> Path:
    root.write_text("")
    return root


def in_no_folder(root: Path) -> Path:
    path = root / "gone" / "file"
    path.write_text("")
    return path


def full_disk(root: Path) -> Path:
    with Path("/dev/full").open("w") as file:
        file.write("x")
    return root


def too_long(root: Path) -> Path:
    path = root / ("x" * 300)
    path.write_text("")
    return path


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (below_a_file, "file/folder: cannot be written: Not a directory; a part of that path is a file"),
        (at_a_file, "file: cannot be written: File exists; a file has the name of that folder"),
        (at_a_folder, ": cannot be written: Is a directory; a folder has the name"),
        (in_no_folder, "gone/file: cannot be written: No such file or directory; a folder on the way"),
        (full_disk, "out: cannot be written: No space left on device; free some space"),
        (too_long, "xxx: cannot be written: File name too long; shorten the name"),
    ],
)
def test_what_the_system_refuses_is_a_sentence(tmp_path: Path, act: Callable[[Path], Path], said: str) -> None:
    with pytest.raises(UserError) as found, writing(tmp_path / "out"):
        act(tmp_path)
    assert said in str(found.value)


def test_an_error_without_a_number_and_other_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out: cannot be written: cut short; check the disk"), writing(tmp_path / "out"):
        raise OSError("cut short")
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError("x")
