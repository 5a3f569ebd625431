"""Several processes: the loopback, torchrun with two processes, DeepSpeed."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from tinyllava_fast.doctor.finding import CHECKS, Finding, fault, note, ok

SECONDS = 120.0
"""Patience with processes that take some seconds, on a busy machine."""
_MEET = """
import torch, torch.distributed as group
group.init_process_group("gloo")
one = torch.ones(1)
group.all_reduce(one)
assert one.item() == 2, one
group.destroy_process_group()
"""


@CHECKS.register("processes")
def processes() -> Iterator[Finding]:
    """Start what training in several processes starts, all at once."""
    refused = loopback()
    if refused:
        yield fault(
            f"this machine does not reach itself at 127.0.0.1: {refused}",
            "ip link set lo up; let a firewall or sandbox pass 127.0.0.0/8",
        )
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "meet.py"
        script.write_text(_MEET, encoding="utf-8")
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        children = {} if refused else {"torchrun": _start(torchrun)}
        if find_spec("deepspeed") is not None:
            children["deepspeed"] = _start(["-c", "import deepspeed"])
        else:
            yield note(
                "DeepSpeed is not installed: engine.type=deepspeed needs it", "pip install 'tinyllava-fast[train]'"
            )
        try:
            for name, child in children.items():
                yield from _result(name, child)
        finally:
            for child in children.values():
                child.kill()
                child.wait()


def loopback() -> str:
    """Connect to this machine through 127.0.0.1; returns why that fails, "" if it does not."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            with socket.create_connection(server.getsockname(), timeout=10):
                return ""
    except OSError as error:
        return error.strerror or str(error)


def _start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")


def _result(name: str, child: subprocess.Popen[str]) -> Iterator[Finding]:
    what = {"torchrun": "torchrun with two processes", "deepspeed": "importing DeepSpeed"}[name]
    try:
        errors = child.communicate(timeout=SECONDS)[1]
    except subprocess.TimeoutExpired:
        yield fault(f"{what} has not ended within {SECONDS:.0f} s", "see what else runs, and what a firewall blocks")
        return
    if child.returncode == 0:
        yield ok({"torchrun": "two processes of torchrun meet over gloo", "deepspeed": "DeepSpeed imports"}[name])
    else:
        lines = [line for line in errors.strip().splitlines() if "Error" in line] or errors.strip().splitlines()
        remedies = {
            "torchrun": "GLOO_SOCKET_IFNAME=lo names the interface; unset MASTER_ADDR and RANK outside of a cluster",
            "deepspeed": "pip install --force-reinstall --no-deps deepspeed",
        }
        yield fault(f"{what} fails: {lines[-1] if lines else f'exit code {child.returncode}'}", remedies[name])
