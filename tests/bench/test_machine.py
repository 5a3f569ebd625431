"""The facts and abilities of this machine."""

from __future__ import annotations

import torch

from tinyllava_fast.bench import machine


def test_pick_device() -> None:
    assert machine.pick_device("cpu") == "cpu"
    assert machine.pick_device("auto") in ("cpu", "cuda")
    assert machine.device_sync("cpu") is None


def test_the_roof_is_measured() -> None:
    roof = machine.roof(torch.float32, quick=True)
    assert set(roof) == {"flops_per_s", "bytes_per_s"} and min(roof.values()) > 0
