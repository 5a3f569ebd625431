"""Devices and links: what collectives take, and what plan.yaml must hold."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from tinyllava_fast.bench import cluster
from tinyllava_fast.bench.cluster import Collective, read_device
from tinyllava_fast.errors import UserError

GPUS = [name for name, facts in cluster.table()["devices"].items() if "measured" not in facts]


def test_every_number_names_its_source() -> None:
    text = (Path(cluster.__file__).parent / "plan.yaml").read_text(encoding="utf-8")
    devices = text[text.index("devices:") : text.index("latency:")]
    rates = [line for line in devices.splitlines() if re.search(r"(flops|bytes)_per_s|mfu", line)]
    assert len(rates) == 6 * len(GPUS)
    bare = [line for line in rates if "#" not in line and "host_bytes_per_s" not in line and "400.0e+9" not in line]
    assert not bare


def test_what_leaves_a_process() -> None:
    assert Collective("gather", 80.0, 3).sent(4) == 60.0
    assert Collective("reduce_scatter", 80.0, 3).sent(4) == 60.0
    assert Collective("all_reduce", 80.0, 3).sent(4) == 120.0


def test_bytes_take_the_slowest_link_and_hops_take_time() -> None:
    device = read_device("h100")
    gigabyte = Collective("gather", 1e9, 1)
    inside, outside = device.seconds(gigabyte, 8), device.seconds(gigabyte, 16)
    assert inside == pytest.approx(1e9 * 7 / 8 / 360e9 + 8.4e-6 + 7 * 3.4e-6)
    assert outside == pytest.approx(1e9 * 15 / 16 / 360e9 + 8.4e-6 + 14 * 3.4e-6 + 14e-6)
    slow = read_device("h100", node_gbps=100)
    assert slow.seconds(gigabyte, 8) == inside
    assert slow.seconds(gigabyte, 16) == pytest.approx(1e9 * 15 / 16 / (0.9 * 12.5e9), rel=1e-2)
    assert device.seconds(gigabyte, 1) == 0.0


def test_an_all_reduce_takes_a_tree_where_a_ring_is_long() -> None:
    device = read_device("h100")
    small = Collective("all_reduce", 0.0, 1)
    assert device.seconds(small, 1024) < device.seconds(Collective("gather", 0.0, 1), 1024)
    assert device.seconds(small, 1024) == pytest.approx(8.4e-6 + 2 * (7 * 4e-6 + 7 * 14e-6))


def test_a_cpu_goes_by_what_was_measured() -> None:
    device = read_device("cpu")
    assert device.is_cpu and device.overlap == 0.0 and device.measured is not None
    found = device.measured[2]["all_reduce"]
    one = Collective("all_reduce", 1e8, 10)
    assert device.seconds(one, 2) == pytest.approx(10 * found.seconds + 1e8 / found.bytes_per_s)
    part = Collective("reduce_scatter", 1e8, 1)
    assert device.sent(part, 2) == 1e8 and part.sent(2) == 5e7 == read_device("h100").sent(part, 2)
    assert device.seconds(part, 2) == pytest.approx(
        device.measured[2]["reduce_scatter"].seconds + 5e7 / device.measured[2]["reduce_scatter"].bytes_per_s
    )
    nodes = dataclasses.replace(device, per_node=1, node_bytes=1e6)
    assert nodes.seconds(one, 2) == pytest.approx(100, rel=0.05)
    assert device.slowdowns(4)[0] > device.slowdowns(1)[0] == 1.0


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UserError, match=r"--gpu 'h1000'; did you mean 'h100'\? Known: a100, cpu"):
        read_device("h1000")
