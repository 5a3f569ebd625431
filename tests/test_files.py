"""Files and folders that appear at once: whole or not at all, whatever fails, and whoever is killed."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from tinyllava_fast import files
from tinyllava_fast.errors import CheckpointError, UserError, writing
from tinyllava_fast.files import TMP, atomic_file, atomic_folder, put_folder, remove, write_file

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def refuse(*_: object) -> None:
    raise FULL


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_when_it_is_complete(tmp_path: Path, durable: bool, umask: None) -> None:
    path = tmp_path / "a.json"
    write_file(path, b"old", durable=durable)
    with atomic_file(path, durable=durable) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path and temporary.name.startswith(TMP)
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [FULL, KeyError("x"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("write", [lambda p: write_file(p, b"x"), lambda p: atomic_folder(p).__enter__()])
def test_a_name_too_long(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with pytest.raises(UserError, match="File name too long"), writing(tmp_path):
        write(tmp_path / ("x" * 300))


def test_an_error_names_the_file_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path}/none/a: cannot be written: No such file or directory"):
        with writing(tmp_path), atomic_file(tmp_path / "none" / "a"):
            pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=rf"^{tmp_path}/folder: cannot be written: Is a directory"), writing(tmp_path):
        write_file(tmp_path / "folder", b"x")
    with pytest.raises(FileNotFoundError) as caught, atomic_file(tmp_path / "a"):
        (tmp_path / "another").read_text()
    assert caught.value.filename == str(tmp_path / "another")


def test_only_what_is_durable_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(files, "sync", lambda path: synced.append(path.name))
    write_file(tmp_path / "a", b"x", durable=False)
    with atomic_folder(tmp_path / "b", durable=False) as folder:
        (folder / "c").write_text("x")
    assert synced == [tmp_path.name]  # the folder's new name
    write_file(tmp_path / "a", b"x")
    assert [name[:5] for name in synced[1:]] == [TMP, tmp_path.name[:5]]
    synced.clear()
    with atomic_folder(tmp_path / "b") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "c").write_text("x")
    assert synced[:2] == ["inner", "c"] and synced[2].startswith(TMP) and synced[3:] == [tmp_path.name]


def test_writers_at_once_do_no_harm(tmp_path: Path) -> None:
    def work(letter: str) -> None:
        for _ in range(50):
            write_file(tmp_path / "a", letter.encode() * 1000, durable=False)

    threads = [threading.Thread(target=work, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = (tmp_path / "a").read_text()
    assert text in {letter * 1000 for letter in "abcd"} and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    path = tmp_path / "deep" / "model"
    for number in (1, 2):
        with atomic_folder(path) as folder:
            (folder / f"{number}.txt").write_text("x")
        assert os.listdir(path) == [f"{number}.txt"] and os.listdir(path.parent) == ["model"]


def test_what_was_there_is_handed_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    for exchange in (files._exchange, lambda *_: False):
        monkeypatch.setattr(files, "_exchange", exchange)
        for path in (new, old):
            path.mkdir()
            (path / path.name).write_text("x")
        put_folder(new, old)
        assert os.listdir(old) == ["new"] and os.listdir(new) == ["old"]
        remove(new)
        remove(old)
    assert not list(tmp_path.iterdir())


def test_a_swap_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = tmp_path / "model", Path.rename
    path.mkdir()
    (path / "old").write_text("x")

    def failing(source: Path, target: Path) -> Path:
        if target == path and not source.name.endswith("-old"):
            raise FULL
        return rename(source, target)

    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match="what was there before is untouched"), atomic_folder(path) as folder:
        (folder / "new").write_text("x")
    assert os.listdir(path) == ["old"] and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("act", "error", "said"),
    [
        (lambda: refuse(), CheckpointError, r"model: cannot write the folder: .*No space left.* untouched\. Free some"),
        (lambda: (_ for _ in ()).throw(SafetensorError("io")), CheckpointError, "cannot write the folder: io"),
        (lambda: {}["x"], KeyError, "x"),
    ],
)
def test_what_fails_leaves_the_old_folder(
    tmp_path: Path, act: Callable[[], object], error: type[Exception], said: str
) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").write_text("x")

    def fill(folder: Path) -> None:
        (folder / "half").write_text("x")
        for _ in act() or ():
            pass

    with pytest.raises(error, match=said), atomic_folder(path) as folder:
        fill(folder)
    assert os.listdir(path) == ["old"] and os.listdir(tmp_path) == ["model"]


def test_a_folders_files_are_as_readable_as_the_umask_has_them(tmp_path: Path, umask: None) -> None:
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "private").touch(mode=0o600)
        (folder / "program").touch(mode=0o777)
    assert [p.stat().st_mode & 0o777 for p in sorted((tmp_path / "model").iterdir())] == [0o640, 0o640]
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750


def test_remove_takes_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("link", "link", "none", "x" * 300):
        remove(tmp_path / name)
    assert os.listdir(tmp_path) == ["kept"]


def _write_for_ever(root: Path) -> None:
    for number in range(10**9):
        text = f"{number} " * 5000
        write_file(root / "file", text.encode())
        with atomic_folder(root / "folder") as folder:
            for name in "abc":
                (folder / name).write_text(text)


def test_a_kill_at_any_instant_leaves_whole_ones(tmp_path: Path) -> None:
    """One writing is there afterwards, and nothing else but names that begin with .tmp-."""
    rng, context = random.Random(0), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tinyllava_fast.files"])
    for _ in range(8):
        known = _written(tmp_path)
        child = context.Process(target=_write_for_ever, args=(tmp_path,))
        child.start()
        while child.is_alive() and _written(tmp_path) == known:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        assert _is_whole((tmp_path / "file").read_text())
        texts = {name: (tmp_path / "folder" / name).read_text() for name in "abc"}
        assert len(set(texts.values())) == 1 and _is_whole(texts["a"])
        assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(TMP)} == {"file", "folder"}


def _written(root: Path) -> int:
    """Return the time when the folder came; 0: not yet."""
    return (root / "folder").stat().st_ctime_ns if (root / "folder").exists() else 0


def _is_whole(text: str) -> bool:
    words = text.split()
    return len(words) == 5000 and len(set(words)) == 1
