"""The pool in a process of its own: it is torch's allocator from there on."""

import functools
import logging
import os
import shutil
import subprocess
import sys

import pytest

from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log
from tinyllava_fast.train import cpu_pool

SCRIPT = """
import resource, sys, torch
from tinyllava_fast.hardware import rss_bytes
from tinyllava_fast.train import cpu_pool
before = torch.arange(100_000)  # torch's own, freed after the pool has come
assert cpu_pool.stats() is None and cpu_pool.install() and cpu_pool.install()
start = cpu_pool.stats(reset=True).used
x = torch.randn(1024, 1024)
assert cpu_pool.stats().used - start == x.nbytes and torch.zeros(0).numel() == 0
del before
held = [torch.full((n,), float(n)) for n in (1, 20_000, 300_000, 5_000_000, 16_383, 16_385)]
for keep in (2, 5):  # holes of several sizes, filled again
    held[keep] = held[keep].clone() + 0
    assert all(bool((t == t.numel()).all()) for t in held)
assert torch.nn.Conv2d(3, 8, 3)(torch.randn(2, 3, 64, 64)).shape == (2, 8, 62, 62)  # oneDNN: raw pointers
grown = torch.ones(10).resize_(100_000)
grown[:] = 2
assert float(grown.sum()) == 200_000
def step():
    kept = [x @ x + i for i in range(8)]
    return sum(float(k[0, 0]) for k in kept)
step()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
peak = cpu_pool.stats(reset=True).peak
for _ in range(4):
    step()
assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 200
assert cpu_pool.stats().peak <= peak
del held, grown
assert cpu_pool.stats().used - start == x.nbytes
large = torch.ones(16 << 20)
del large
before = rss_bytes()
cpu_pool.trim()
assert before - rss_bytes() > 60 << 20 and float((x @ torch.eye(1024) - x).abs().max()) == 0
"""


def test_memory_is_found_again_and_holds_what_was_put_there():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_allocator_is_refused(monkeypatch):
    monkeypatch.setenv(cpu_pool.SWITCH, "pol")
    with pytest.raises(UserError, match=r"TLF_CPU_ALLOCATOR: 'pol'.*pool"):
        cpu_pool.install()
    monkeypatch.setenv(cpu_pool.SWITCH, "torch")
    assert not cpu_pool.install()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TLF_CACHE", str(tmp_path / "cache"))
    return tmp_path


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/nonexistent/c++", "No such file"),
        ("/bin/false", "non-zero exit status"),
        ("echo error: too old >&2; exit 1", "error: too old"),
        ("echo note; echo x.h:1: fatal error: missing >&2; exit 1", "fatal error: missing"),
        ("printf '\\377' >&2; exit 1", "does not build"),
        ("exit 0", "cpu_pool"),  # says that it worked, and wrote nothing
        ("'unbalanced", "No closing quotation"),
    ],
)
def test_without_a_compiler_that_works_torch_keeps_its_allocator(compiler, reason, empty_cache, monkeypatch, caplog):
    if not compiler.startswith(("/", "'")):
        compiler = script(empty_cache / "compiler", compiler)
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(cpu_pool, "_library", functools.cache(cpu_pool._library.__wrapped__))  # this process has a pool
    assert not cpu_pool.install() and not cpu_pool.install() and cpu_pool.stats() is None
    (message,) = [r.getMessage() for r in caplog.records]
    assert reason in message and "Install a C++ compiler or name one with CXX" in message and "\n" not in message


def test_a_compiler_may_have_arguments(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", f"env {shutil.which('c++') or 'g++'} -DNOTHING=1")
    built = cpu_pool._build()
    assert built.parent == empty_cache / "cache" and built == cpu_pool._build()
    assert os.listdir(built.parent) == [built.name]


@pytest.mark.parametrize("kept", [b"", b"not a library" * 100])
def test_a_kept_library_that_does_not_load_is_built_again(kept, empty_cache):
    built = cpu_pool._build()
    built.unlink()
    built.write_bytes(kept)
    assert cpu_pool._load().tlf_pool_install is not None
    assert built.read_bytes().startswith(b"\x7fELF")
