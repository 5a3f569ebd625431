"""Memory of a call: a tensor of known size is seen, wherever it was allocated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tinyllava_fast.bench import memory
from tinyllava_fast.ops import _cpp
from tinyllava_fast.train import cpu_pool

MB = 1 << 20
SIZE = 64 * MB


@pytest.fixture(autouse=True)
def nothing_free_in_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test before has trained, torch has the pool, whose free memory hides new allocations as malloc's does."""
    give_back = memory._return_freed_memory

    def give_back_all() -> None:
        give_back()
        cpu_pool.trim()

    monkeypatch.setattr(memory, "_return_freed_memory", give_back_all)


def made_by_torch() -> Tensor:
    return torch.ones(SIZE, dtype=torch.uint8)


def made_by_numpy() -> Tensor:
    return _cpp.empty(SIZE, dtype=torch.uint8).fill_(1)


def freed_before_it_returns() -> Tensor:
    return made_by_torch()[:1].clone()


@pytest.mark.parametrize("run", [made_by_torch, made_by_numpy, freed_before_it_returns])
def test_a_tensor_of_known_size_is_seen(run) -> None:
    run()
    peak = memory.peak_extra_bytes(run)
    if peak is None:
        pytest.skip("this kernel does not let the high-water mark be reset")
    assert SIZE - 4 * MB < peak < SIZE + 16 * MB


def test_a_former_peak_and_freed_memory_do_not_hide_a_smaller_one() -> None:
    for _ in range(3):
        torch.ones(4 * SIZE, dtype=torch.uint8)
    small = memory.peak_extra_bytes(lambda: None)
    if small is None:
        pytest.skip("this kernel does not let the high-water mark be reset")
    assert small < 4 * MB
    kept = [torch.ones(MB, dtype=torch.uint8) for _ in range(64)]  # below malloc's threshold: from the heap
    del kept
    peak = memory.peak_extra_bytes(lambda: [torch.ones(MB, dtype=torch.uint8) for _ in range(64)])
    assert peak is not None and SIZE - 4 * MB < peak < SIZE + 16 * MB


def test_saved_bytes_count_storages_once_and_not_those_that_exist() -> None:
    x = torch.ones(1000, requires_grad=True)
    w = torch.ones(1000)

    def kept(run, *existing: Tensor) -> int:
        with memory.saved(*existing) as found:
            out = run()
            out.backward()
        return sum(found.values())

    assert kept(lambda: (x * w).sum(), x, w) == 0
    assert kept(lambda: (x.exp() * w).sum(), x, w) == 4000  # exp saves its result
    assert kept(lambda: (x.exp() * w).sum(), x) == 8000
