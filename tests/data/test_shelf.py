from __future__ import annotations

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from tinyllava_fast import hardware
from tinyllava_fast.data import shelf
from tinyllava_fast.errors import DataError, UserError

DTYPES = {"a": np.dtype("<i8")}


@pytest.fixture(autouse=True)
def tokens(tmp_path, monkeypatch):
    """The folder of the cache, which is empty."""
    monkeypatch.setenv("TLF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(shelf.LIMIT, "1")
    return tmp_path / "cache" / "tokens"


class Maker:
    """Writes count numbers; says how often."""

    def __init__(self, count=10):
        self.count, self.made = count, 0

    def __call__(self, columns):
        self.made += 1
        columns.append("a", np.arange(self.count))


def test_made_once_and_kept(tokens):
    make = Maker()
    for _ in range(3):
        assert shelf.take("k", DTYPES, make, "what")["a"].tolist() == list(range(10))
    assert make.made == 1 and sorted(p.name for p in tokens.iterdir()) == ["k"]
    shelf.take("other", DTYPES, make, "what")
    assert make.made == 2


def test_what_is_damaged_is_made_again_and_said_once(tokens, caplog):
    make = Maker()
    shelf.take("k", DTYPES, make, "what")
    (tokens / "k" / "a").write_bytes(b"x" * 80)
    for _ in range(2):
        assert shelf.take("k", DTYPES, make, "what")["a"].tolist() == list(range(10))
    assert make.made == 2
    assert [r.getMessage() for r in caplog.records] == [f"{tokens / 'k' / 'a'}: damaged; it is made again"]


def test_an_error_leaves_nothing(tokens):
    def fail(columns):
        columns.append("a", np.arange(3))
        raise DataError("record 3")

    with pytest.raises(DataError, match="record 3"):
        shelf.take("k", DTYPES, fail, "what")
    assert not list(tokens.iterdir())


@pytest.mark.parametrize("how", ["limit", "file", "full"])
def test_a_cache_that_cannot_keep_them(tokens, how, monkeypatch, caplog, tmp_path):
    make = Maker()
    if how == "limit":
        monkeypatch.setenv(shelf.LIMIT, "0")
    elif how == "file":
        tokens.parent.mkdir()
        tokens.write_text("in the way")
    else:
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
        written = shelf._write

        def full(folder, *arguments):
            if folder.parent == tokens:
                raise OSError(28, "No space left on device")
            written(folder, *arguments)

        monkeypatch.setattr(shelf, "_write", full)
    columns = shelf.take("k", DTYPES, make, "what")
    assert columns["a"].tolist() == list(range(10))
    assert not tokens.is_dir() or not list(tokens.iterdir())
    assert make.made == 1 and bool(caplog.records) == (how != "limit")
    if how == "full":
        assert "what: not kept for the next start" in caplog.text and "No space left" in caplog.text
        assert not list((tmp_path / "tmp").iterdir())


def test_no_room_anywhere_is_an_error(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shelf, "_write", full)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device; free some space"):
        shelf.take("k", DTYPES, Maker(), "what")


@pytest.mark.parametrize("text", ["many", "-1", "nan"])
def test_a_limit_that_is_no_number(text, monkeypatch):
    monkeypatch.setenv(shelf.LIMIT, text)
    with pytest.raises(
        UserError, match=rf"environment variable TLF_TOKENS_GIB: expected a number of GiB, got '{text}'"
    ):
        shelf.take("k", DTYPES, Maker(), "what")


def test_the_ones_used_longest_ago_go_first(tokens, monkeypatch):
    monkeypatch.setenv(shelf.LIMIT, str(30_000 / 2**30))
    held = shelf.take("k0", DTYPES, Maker(1000), "what")  # 8 kB each
    for number in (1, 2):
        shelf.take(f"k{number}", DTYPES, Maker(1000), "what")
        os.utime(tokens / f"k{number}" / shelf.INDEX, (number, number))
    os.utime(tokens / "k0" / shelf.INDEX, (0, 0))
    shelf.take("k1", DTYPES, Maker(), "what")  # used again
    (tokens / ".tmp-dead-k9").mkdir()
    os.utime(tokens / ".tmp-dead-k9", (5, 5))
    shelf.take("k3", DTYPES, Maker(1000), "what")
    assert sorted(p.name for p in tokens.iterdir()) == ["k0", "k1", "k3"]  # k0 is open
    assert held["a"][999] == 999
    del held
    shelf.take("k4", DTYPES, Maker(1000), "what")
    assert "k0" not in {p.name for p in tokens.iterdir()}


def _take_slowly(folder):
    """Notes in files who makes it and what was taken: a queue's lock dies with a process that is killed."""

    def make(columns):
        (folder / f"made-{os.getpid()}").touch()
        time.sleep(0.5)
        return Maker()(columns)

    taken = shelf.take("k", DTYPES, make, "what")["a"].tolist()
    (folder / f"took-{os.getpid()}").write_text(str(taken))


def test_processes_share_one_and_take_over_from_the_dead(tokens, tmp_path):
    hardware.cache_folder()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_take_slowly, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + 60
        while not (made := list(tmp_path.glob("made-*"))):
            assert time.monotonic() < deadline, "none of three processes began"
            time.sleep(0.01)
        maker = int(made[0].name.removeprefix("made-"))
        os.kill(maker, signal.SIGKILL)
        for process in processes:
            process.join(60)
        assert sorted(process.exitcode for process in processes) == [-signal.SIGKILL, 0, 0]
    finally:
        for process in processes:
            process.kill()
            process.join()
    taken = {path.name: path.read_text() for path in tmp_path.glob("took-*")}
    assert len(taken) == 2 and set(taken.values()) == {str(list(range(10)))}
    assert len(list(tmp_path.glob("made-*"))) == 2  # one of the two made them for both
    assert (tokens / "k").is_dir() and not list(tokens.glob("*.lock"))


def test_one_that_shows_no_progress_is_not_waited_for(tokens, monkeypatch, caplog):
    monkeypatch.setattr(shelf, "_PATIENCE_S", 0.3)
    hardware.cache_folder()
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def hang():
        with shelf.turn("k", "what"):
            ready.set()
            time.sleep(60)

    process = context.Process(target=hang)
    process.start()
    try:
        assert ready.wait(20)
        assert len(shelf.take("k", DTYPES, Maker(), "what")["a"]) == 10
    finally:
        process.kill()
        process.join()
    assert "what: the process that prepares it shows no progress; going on without it" in caplog.text


def test_work_beside_the_columns_is_a_sign_of_life_too(tokens):
    with shelf.turn("k", "what") as alive:
        os.utime(tokens / "k.lock", (5, 5))
        assert shelf._sign_of_life("k") == 5
        alive()
        assert shelf._sign_of_life("k") > 5


def test_headers_of_images_that_are_looked_at_are_signs_of_life(make, monkeypatch):
    signs = []
    monkeypatch.setattr("tinyllava_fast.data.files._MANY", 0)
    monkeypatch.setattr("tinyllava_fast.data.files._PART", 5)
    monkeypatch.setattr("tinyllava_fast.data.files.cores", lambda: 1)
    real = os.utime
    monkeypatch.setattr(os, "utime", lambda file, *times: (signs.append(file), real(file, *times)))
    make()
    assert sum(isinstance(file, int) for file in signs) == 4  # 16 images
