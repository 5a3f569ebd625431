"""What every test can rely on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tinyllava_fast.log import log


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
