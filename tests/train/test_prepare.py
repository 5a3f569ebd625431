from __future__ import annotations

import pytest
import torch

from tinyllava_fast.config.schema import EngineConfig
from tinyllava_fast.train import prepare
from tinyllava_fast.train.engine.launch import Process


@pytest.mark.parametrize(
    ("asked", "device", "cores", "ranks", "expected"),
    [
        (None, "cpu", 64, 1, 1),
        (None, "cuda", 6, 1, 5),
        (None, "cuda", 64, 2, 8),
        (None, "cuda", 8, 4, 1),
        (None, "cuda", 1, 4, 1),
        (0, "cuda", 64, 1, 0),
        (12, "cpu", 2, 1, 12),
    ],
)
def test_the_number_of_workers_follows_the_cores(asked, device, cores, ranks, expected, monkeypatch):
    monkeypatch.setattr("tinyllava_fast.hardware.cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert prepare._workers(EngineConfig(workers=asked), Process(0, 1, torch.device(device))) == expected
