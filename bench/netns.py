"""Network namespaces of Linux joined by a bridge, each sending at a limited rate: nodes of a cluster on one machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tinyllava_fast.errors import UserError

PREFIX, BRIDGE, DEVICE = "tlf-plan", "bridge0", "link0"
_CLONE_NEWNET = 0x40000000  # sched.h


def address(rank: int) -> str:
    """Return the address of a namespace's only link."""
    return f"10.123.77.{rank + 1}"


@contextlib.contextmanager
def namespaces(count: int, mbit: int) -> Iterator[list[str]]:
    """Yield the names of so many namespaces, each of which sends at most ``mbit`` Mbit/s; removed at the end.

    UserError without root, iproute2 or the kernel's parts for it.
    """
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        raise UserError("--network: needs root, and ip and tc of iproute2 (apt-get install iproute2)")
    names, hub = [f"{PREFIX}-{rank}" for rank in range(count)], f"{PREFIX}-hub"
    try:
        _run("ip", "netns", "add", hub)
        _run("ip", "-n", hub, "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "-n", hub, "link", "set", BRIDGE, "up")
        for rank, name in enumerate(names):
            port = f"port{rank}"
            _run("ip", "netns", "add", name)
            pair = ("type", "veth", "peer", "name", port, "netns", hub)
            _run("ip", "-n", name, "link", "add", DEVICE, *pair)
            _run("ip", "-n", hub, "link", "set", port, "master", BRIDGE, "up")
            _run("ip", "-n", name, "addr", "add", f"{address(rank)}/24", "dev", DEVICE)
            for link in ("lo", DEVICE):
                _run("ip", "-n", name, "link", "set", link, "up")
            # A burst holds the largest packet that TCP hands over whole.
            limit = ("tbf", "rate", f"{mbit}mbit", "burst", "256kb", "latency", "100ms")
            _run("tc", "-n", name, "qdisc", "add", "dev", DEVICE, "root", *limit)
        yield names
    finally:
        for name in (hub, *names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def enter(name: str) -> None:
    """Move the calling thread, and those that it starts, into a namespace."""
    with Path(f"/var/run/netns/{name}").open("rb") as handle:
        if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")


def sent_bytes() -> int:
    """Return what this namespace's link has sent."""
    for line in Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == DEVICE:
            return int(numbers.split()[8])
    return 0


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"--network: {' '.join(words)}: {done.stderr.strip() or done.returncode}")
