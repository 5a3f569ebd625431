"""Devices and the links between them, as `tlf-bench plan` knows them, and the seconds that collectives take there.

A collective of n processes moves (n - 1) / n of its bytes out of each process, an all-reduce twice that. In rings,
whose slowest link sets the pace: inside a node the devices' own, between nodes the node's ports together, for a ring
leaves and enters a node once for each port. Beside the bytes each hop costs latency; an all-reduce takes a tree
instead where that has fewer. All constants are in plan.yaml; what plan-check has measured of a CPU is read from its
file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from tinyllava_fast.bench.report import Report
from tinyllava_fast.errors import UserError, nearest

HERE = Path(__file__).parent
Kind = Literal["gather", "reduce_scatter", "all_reduce"]
_TIMES: dict[Kind, int] = {"gather": 1, "reduce_scatter": 1, "all_reduce": 2}  # that a byte leaves a process


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a step: so many, of so many bytes together, each counted whole."""

    kind: Kind
    bytes: float
    count: int

    def sent(self, processes: int) -> float:
        """Return the bytes that leave each of so many processes."""
        return _TIMES[self.kind] * self.bytes * (processes - 1) / processes


@dataclass(frozen=True)
class Latency:
    """Seconds of a collective beside its bytes: at its start, for each hop of a ring, for each level of a tree."""

    start: float
    ring_hop: float
    tree_hop: float


@dataclass(frozen=True)
class Measured:
    """The measured cost of a collective of so many processes: seconds each, and `Collective.sent` bytes a second."""

    seconds: float
    bytes_per_s: float


@dataclass(frozen=True)
class Device:
    """A kind of accelerator, or a CPU, and how its like are joined. Rates are a second.

    flops: of the training dtype, mfu: the share that a pass without communication reaches. update_bytes: of memory
    traffic in an update. node_bytes: of a node's ports together, host_bytes: between device and host, each one way.
    context: memory of a process beside its tensors.
    measured: collectives of a CPU by their number of processes; slowdown: of computation and of updates, likewise.
    volume: times the bytes of a ring that a kind really sends, where that is not 1.
    """

    name: str
    title: str
    memory: float
    flops: float
    mfu: float
    update_bytes: float
    per_node: int
    inside_bytes: float
    inside: Latency
    network: Latency
    node_bytes: float
    host_bytes: float
    overlap: float
    context: float
    measured: Mapping[int, Mapping[Kind, Measured]] | None = None
    slowdown: Mapping[int, tuple[float, float]] | None = None
    volume: Mapping[Kind, float] = field(default_factory=dict)

    @property
    def is_cpu(self) -> bool:
        """Return True for a CPU, whose processes share its cores."""
        return self.measured is not None

    def slowdowns(self, processes: int) -> tuple[float, float]:
        """Return how much longer a process computes, and updates, beside the others of its node."""
        if not self.slowdown:
            return 1.0, 1.0
        here = min(processes, self.per_node)
        return self.slowdown[min(self.slowdown, key=lambda known: (abs(known - here), known))]

    def sent(self, one: Collective, processes: int) -> float:
        """Return the bytes that leave each of so many processes, as their library sends them."""
        return one.sent(processes) * self.volume.get(one.kind, 1)

    def seconds(self, one: Collective, processes: int) -> float:
        """Return what collectives of so many processes take, nothing else going on."""
        if processes == 1 or one.count == 0:
            return 0.0
        nodes = math.ceil(processes / self.per_node)
        if self.measured is not None:
            here = min(self.measured, key=lambda known: abs(known - min(processes, self.per_node)))
            found = self.measured[here][one.kind]
            between = self.sent(one, processes) * self.per_node / self.node_bytes if nodes > 1 else 0.0
            hops = one.count * _TIMES[one.kind] * (nodes - 1) * self.network.ring_hop
            return one.count * found.seconds + max(one.sent(processes) / found.bytes_per_s, between) + hops
        pace = min(self.inside_bytes, self.node_bytes) if nodes > 1 else self.inside_bytes
        times, hops = _TIMES[one.kind], processes - 1
        ring = times * ((hops - (nodes - 1)) * self.inside.ring_hop + (nodes - 1) * self.network.ring_hop)
        if one.kind == "all_reduce":
            here = math.ceil(processes / nodes) - 1
            tree = 2 * (here * self.inside.tree_hop + math.log2(nodes) * self.network.tree_hop)
            ring = min(ring, tree)
        return one.count * (self.inside.start + ring) + one.sent(processes) / pace


def table() -> Report:
    """Return plan.yaml."""
    found: Report = yaml.safe_load((HERE / "plan.yaml").read_text(encoding="utf-8"))
    return found


def read_device(name: str, *, node_gbps: float | None = None, per_node: int | None = None) -> Device:
    """Return a device of plan.yaml. node_gbps: another speed between nodes, in Gb/s a node. UserError for its name."""
    known = table()
    if name not in known["devices"]:
        raise UserError(f"--gpu {name!r}; {nearest(name, known['devices'])}")
    facts = known["devices"][name]
    if "measured" in facts:
        result = json.loads((HERE / "results" / facts["measured"]).read_text(encoding="utf-8"))
        return measured_cpu(result, node_gbps=node_gbps, per_node=per_node)
    network = Latency(start=0.0, **known["latency"]["network"])
    ports = node_gbps * 1e9 / 8 if node_gbps else facts["node_bytes_per_s"]
    return Device(
        name=name,
        title=facts["title"],
        memory=facts["memory_gib"] * 2**30,
        flops=facts["flops_per_s"],
        mfu=facts["mfu"],
        update_bytes=known["update_reached"] * facts["memory_bytes_per_s"],
        per_node=per_node or facts["per_node"],
        inside_bytes=facts["inside"]["bytes_per_s"],
        inside=Latency(**known["latency"][facts["inside"]["kind"]]),
        network=network,
        node_bytes=known["network_reached"] * ports,
        host_bytes=facts["host_bytes_per_s"],
        overlap=known["overlap"],
        context=known["context_bytes"],
    )


def measured_cpu(result: Report, *, node_gbps: float | None = None, per_node: int | None = None) -> Device:
    """Return the CPU that `tlf-bench plan-check` has measured, in nodes of the most processes that it started."""
    found = result["constants"]
    collectives: dict[int, Mapping[Kind, Measured]] = {
        int(count): {kind: Measured(**cost) for kind, cost in costs.items()}
        for count, costs in found["collectives"].items()
    }
    none = Latency(0.0, 0.0, 0.0)
    return Device(
        name="cpu",
        title=f"{result['machine']['cpu']}, {result['machine']['cores']} cores",
        memory=result["machine"]["memory_bytes"],
        flops=found["gemm_flops_per_s"],
        mfu=found["mfu"],
        update_bytes=found["update_bytes_per_s"],
        per_node=per_node or max(collectives),
        inside_bytes=math.inf,
        inside=none,
        network=Latency(0.0, found["hop_seconds"], found["hop_seconds"]),
        node_bytes=(node_gbps or 10.0) * 1e9 / 8,
        host_bytes=math.inf,
        overlap=0.0,
        context=found["process_bytes"],
        measured=collectives,
        slowdown={int(count): (factor, found["update_slowdown"][count]) for count, factor in found["slowdown"].items()},
        volume=table()["gloo_volume"],
    )
