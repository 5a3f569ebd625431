from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.testing


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Compiled graphs of one test must not count as recompiles of the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny shapes: a thread team costs more than it gives. test_threads asks for more itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
