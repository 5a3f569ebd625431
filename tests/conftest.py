"""What every test can rely on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tinyllava_fast.log import log


def pytest_configure() -> None:
    """Test processes side by side share the cores; what they start does, too."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """Commands set up the package's logger and torch's threads; other tests must not notice."""
    level, handlers, propagate = log.level, list(log.handlers), log.propagate
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    log.setLevel(level)
    log.handlers[:] = handlers
    log.propagate = propagate
