"""Settings that every test can rely on."""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tinyllava_fast.log import log


def pytest_configure() -> None:
    """Test processes side by side share the cores; what they start does, too. Tokens are not kept for other tests.

    Signals do what they do in a terminal: what nohup or a shell's "&" let this process ignore, its children would, too.
    """
    for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)
    os.environ.setdefault("TLF_TOKENS_GIB", "0")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        torch.set_num_threads(threads)


def folder_of(item: pytest.Item) -> tuple[str, ...]:
    """Return the parts of tests/train for whatever lies below it."""
    return tuple(item.nodeid.partition("::")[0].split("/")[:2])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A folder's files with a slow test go first: no test process is to be alone with one of them in the end.

    Tests marked ``exports`` run where they are asked for.
    """
    if "exports" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("exports")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    folders = list(dict.fromkeys(folder_of(item) for item in items))
    items.sort(key=lambda item: (folders.index(folder_of(item)), item.path not in slow))


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays: no garbage collection, of which every stage has one, visits it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter collect everything at its end: nanobind would list what it misses as leaks."""
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Test processes take whole files, for the fixtures that a file shares, and tests/kernels at once (its conftest).

    A mark xdist_group would say the same, but pytest-xdist 3.8 loses its groups under pytest 9.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/kernels" if nodeid.startswith("tests/kernels/") else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def _reset_log() -> None:
    log.setLevel(logging.NOTSET)
    log.handlers.clear()
    log.propagate = True


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """Commands set up the package's logger and torch's threads; other tests must not notice.

    The logger starts bare, not as it was found: fixtures of a module or session run commands, too, before this one.
    """
    _reset_log()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _reset_log()
