import ctypes
import logging
import os
import platform
import pwd
import stat
import subprocess
import sys
import tempfile

import pytest

from tinyllava_fast import hardware
from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log

FAULTS = """
import resource, sys
if sys.argv[1] == "prepared":
    from tinyllava_fast.hardware import keeps_memory, prepare_memory
    assert prepare_memory() and keeps_memory()
import torch
x = torch.ones(8 * 2**20)
y = x + 1
del y
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    y = x + 1
    del y
sys.stdout.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""


def faults(mode):
    env = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    return int(
        subprocess.run([sys.executable, "-c", FAULTS, mode], env=env, capture_output=True, text=True, check=True).stdout
    )


def test_freed_tensors_are_reused_without_page_faults():
    assert faults("prepared") < faults("plain") / 10


def test_without_glibc_it_says_no(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    monkeypatch.setitem(hardware._memory, "kept", True)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not hardware.prepare_memory()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"  # the user's own value stays
    assert not hardware.keeps_memory()


@pytest.fixture
def user(tmp_path, monkeypatch, caplog):
    """A user without a home or any variable, whose temporary files go to tmp_path/tmp."""

    def unknown(_):
        raise KeyError("getpwuid(): uid not found")

    for name in ("TLF_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.WARNING)
    hardware._writable_cache.cache_clear()
    yield tmp_path
    hardware._writable_cache.cache_clear()


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ({"TLF_CACHE": "{}/a/b"}, "a/b"),
        ({"XDG_CACHE_HOME": "{}/x", "HOME": "{}/h"}, "x/tinyllava_fast"),
        ({"HOME": "{}/h"}, "h/.cache/tinyllava_fast"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "{}/h"}, "h/.cache/tinyllava_fast"),
        ({"TLF_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "{}/h"}, "h/.cache/tinyllava_fast"),
    ],
)
def test_the_cache_folder_is_the_users(given, folder, user, monkeypatch, caplog):
    for name, value in given.items():
        monkeypatch.setenv(name, value.format(user))
    assert hardware.cache_folder() == user / folder and (user / folder).is_dir()
    assert not caplog.records


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "knows no home of this user"),
        ({"HOME": ""}, "knows no home of this user"),
        ({"HOME": "somewhere"}, "knows no home of this user"),
        ({"HOME": "/proc/nonexistent"}, "/proc/nonexistent"),
        ({"XDG_CACHE_HOME": "/proc/nonexistent"}, "/proc/nonexistent"),
        ({"TLF_CACHE": "{}/file"}, "file"),
        ({"TLF_CACHE": "{}/file/below"}, "file"),
        ({"TLF_CACHE": "/proc/nonexistent"}, "/proc/nonexistent"),
        ({"TLF_CACHE": "{}/" + "long" * 99}, "File name too long"),
    ],
)
def test_a_cache_folder_that_cannot_be_written_is_replaced_with_one_warning(given, reason, user, monkeypatch, caplog):
    (user / "file").write_text("")
    for name, value in given.items():
        monkeypatch.setenv(name, value.format(user))
    folder = hardware.cache_folder()
    assert folder == hardware.cache_folder() == user / "tmp" / f"tinyllava_fast-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (message,) = [r.getMessage() for r in caplog.records]
    assert reason in message and "TLF_CACHE names another" in message


def test_a_temporary_cache_that_others_may_write_to_is_not_trusted(user):
    planted = user / "tmp" / f"tinyllava_fast-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    folder = hardware.cache_folder()
    assert folder != planted and folder.is_dir() and stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_where_nothing_can_be_written_using_the_cache_is_an_oserror(user, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nonexistent")
    with pytest.raises(OSError, match="tinyllava_fast"):
        (hardware.cache_folder() / "file").write_text("")


def test_one_heap_gives_large_blocks_back():
    """In a process of its own, for it changes the allocator; threads and sizes as those of a server's passes."""
    code = """
import ctypes, threading
from tinyllava_fast.hardware import bound_memory, release_memory, rss_bytes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def use(size):
    blocks = [libc.malloc(size) for _ in range(3)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
assert bound_memory()
before = rss_bytes()
for size in (5 << 20, 20 << 20, 1 << 20):
    for thread in [threading.Thread(target=use, args=(size,)) for _ in range(2)]:
        thread.start()
        thread.join()
    use(size)
release_memory()
assert rss_bytes() - before < 4 << 20, rss_bytes() - before
"""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the C library is not glibc")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_gpu_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert hardware.own_gpu(3) == 3
    with pytest.raises(UserError, match="LOCAL_RANK is 4, but this process sees 4 GPUs"):
        hardware.own_gpu(4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert hardware.own_gpu(3) == 0  # srun --gpus-per-task=1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UserError, match="LOCAL_RANK is 1, but this process sees 1 GPUs"):
        hardware.own_gpu(1)


def test_a_server_keeps_few_prepared_products():
    """In a process of its own: torch reads the limits once. By default 80 products take 45 MB where oneDNN runs."""
    code = """
import torch
from tinyllava_fast.hardware import bound_memory, release_memory, rss_bytes
assert bound_memory()
weight = torch.ones(64, 64, dtype=torch.bfloat16)
def use(first, count):
    for rows in range(first, first + count):
        torch.nn.functional.linear(torch.ones(rows, 64, dtype=torch.bfloat16), weight)
    release_memory()
    return rss_bytes()
before = use(20, 40)
after = use(100, 80)
assert after - before < 8 << 20, (before, after)
"""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the C library is not glibc")
    subprocess.run([sys.executable, "-c", code], check=True)
