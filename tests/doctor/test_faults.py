"""Faults planted one by one: each is found, with what to do; and nothing is found where nothing is wrong."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tinyllava_fast import hardware
from tinyllava_fast.bench import machine
from tinyllava_fast.doctor import cgroup
from tinyllava_fast.doctor.checks import caches, extension, gpu, kernels, memory, packages, processes, products
from tinyllava_fast.doctor.cli import main
from tinyllava_fast.doctor.examine import Examined, examine
from tinyllava_fast.doctor.finding import CHECKS, Finding
from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._agreement import load_ops

Patch = pytest.MonkeyPatch
INTEL = extension.cpu_flags() | set().union(*extension._NEEDS.values())


@pytest.fixture(autouse=True)
def quick(monkeypatch: Patch) -> Iterator[None]:
    """Small measurements, all cores, the first sample of each op; the extension is loaded afresh before and after."""
    for name in ("read_bandwidth", "copy_bandwidth"):
        monkeypatch.setattr(machine, name, functools.partial(getattr(machine, name), quick=True))
    monkeypatch.setattr(kernels, "SECONDS", 0.0)
    monkeypatch.setattr(products, "_SHAPE", (64, 64, 64))
    for name in ("TLF_TOKENS_GIB", "TLF_ISA", "TLF_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(hardware.cores())
    load = _cpp.load
    load.cache_clear()
    yield
    load.cache_clear()


def cpu(monkeypatch: Patch, isa: str, flags: set[str]) -> None:
    """An extension that runs on these instructions, on a CPU with those features."""
    module = SimpleNamespace(isa=lambda: isa, ABI=_cpp.ABI)
    monkeypatch.setattr(_cpp, "load", lambda: (module, ""))
    monkeypatch.setattr(extension, "cpu_flags", lambda: flags)


def groups(monkeypatch: Patch, folder: Path, own: str, **files: str) -> None:
    """Control groups of one level below their root, with files of these contents."""
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "own").write_text(own)
    monkeypatch.setattr(cgroup, "ROOT", folder)
    monkeypatch.setattr(cgroup, "OWN", folder / "own")


def wrong_kernel(monkeypatch: Patch, _: Path) -> None:
    op = load_ops()["row_argmax"]
    monkeypatch.setattr(op, "cpp", lambda *args: op.reference(*args) + 1)


def wrong_library(monkeypatch: Patch, _: Path) -> None:
    cpu(monkeypatch, "baseline", set())  # it has none of the kernels


def stale_extension(monkeypatch: Patch, _: Path) -> None:
    monkeypatch.setattr(_cpp, "ABI", 999)


def tiles_refused(monkeypatch: Patch, _: Path) -> None:
    cpu(monkeypatch, "avx512bf16", INTEL)
    monkeypatch.setattr(extension, "tile_refusal", lambda: "Operation not permitted")


def old_build(monkeypatch: Patch, _: Path) -> None:
    cpu(monkeypatch, "avx2", INTEL - extension._NEEDS["amx"])


def no_write_permission(monkeypatch: Patch, folder: Path) -> None:
    (folder / "file").write_text("")
    monkeypatch.setenv("TLF_CACHE", str(folder / "file" / "cache"))


def full_disk(monkeypatch: Patch, _: Path) -> None:
    monkeypatch.setattr(caches, "free_bytes", lambda _: 5 << 20)


def one_thread(monkeypatch: Patch, _: Path) -> None:
    monkeypatch.setattr(hardware, "cores", lambda: 8)
    torch.set_num_threads(1)


def quota(monkeypatch: Patch, folder: Path) -> None:
    groups(monkeypatch, folder, "0::/box\n", box__cpu_dot_max="100000 100000\n", cpu_dot_max="max 100000\n")
    torch.set_num_threads(2)


def quota_of_version_1(monkeypatch: Patch, folder: Path) -> None:
    files = {"cpu__cpu_dot_cfs_quota_us": "50000", "cpu__cpu_dot_cfs_period_us": "100000"}
    groups(monkeypatch, folder, "3:cpu,cpuacct:/not/mounted/here\n", **files)
    torch.set_num_threads(2)


def little_memory(monkeypatch: Patch, folder: Path) -> None:
    groups(monkeypatch, folder, "0::/\n", memory_dot_max=str(2**29))


def no_huge_pages(monkeypatch: Patch, folder: Path) -> None:
    (folder / "enabled").write_text("always madvise [never]\n")
    monkeypatch.setattr(memory, "HUGE_PAGES", folder / "enabled")


def version_of(name: str, version: str | None) -> Callable[[Patch, Path], None]:
    def plant(monkeypatch: Patch, _: Path) -> None:
        real = packages.installed
        monkeypatch.setattr(packages, "installed", lambda asked: version if asked == name else real(asked))

    return plant


def variable(name: str, value: str) -> Callable[[Patch, Path], None]:
    return lambda monkeypatch, _: monkeypatch.setenv(name, value)


def wrong_products(monkeypatch: Patch, _: Path) -> None:
    right = torch.nn.functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return right(x, weight) + 3 if x.dtype == torch.bfloat16 else right(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)


def no_loopback(monkeypatch: Patch, _: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(processes.socket, "create_connection", refuse)
    monkeypatch.setattr(processes, "find_spec", lambda _: None)  # nothing is started


def driver_without_cuda(monkeypatch: Patch, folder: Path) -> None:
    (folder / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri\n")
    monkeypatch.setattr(gpu, "DRIVER", folder / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)


def broken_check(monkeypatch: Patch, _: Path) -> None:
    monkeypatch.setattr(cgroup, "cpu_quota", lambda: 1 / 0)


FAULTS: dict[str, tuple[Callable[[Patch, Path], None], str, str]] = {
    "wrong kernel": (wrong_kernel, "kernels", "the cpp kernel is wrong: output 0 of row_argmax"),
    "wrong kernel library": (wrong_library, "kernels", "AttributeError"),
    "stale extension": (stale_extension, "extension", "this package needs 999"),
    "AMX refused": (tiles_refused, "extension", "Linux refuses its tiles to this process (Operation not permitted)"),
    "old build": (old_build, "extension", "were built up to avx2, this CPU has avx512bf16"),
    "no write permission": (no_write_permission, "caches", "cannot be written: Not a directory"),
    "full disk": (full_disk, "caches", "has 5 MiB left"),
    "one thread": (one_thread, "threads", "one thread on 8 cores"),
    "quota": (quota, "threads", "a quota allows 1: threads that wait"),
    "quota of cgroup 1": (quota_of_version_1, "threads", "a quota allows 0.5"),
    "little memory": (little_memory, "memory", "may hold 0.5"),
    "no huge pages": (no_huge_pages, "memory", "huge pages are off"),
    "old torch": (version_of("torch", "2.1.0"), "packages", "tinyllava-fast needs torch>="),
    "missing package": (version_of("safetensors", None), "packages", "needs safetensors, which is not installed"),
    "broken compiler": (variable("CXX", "false"), "compiler", "the C++ compiler false does not work"),
    "bad variable": (variable("TLF_BACKEND", "cuda"), "variables", "TLF_BACKEND='cuda'"),
    "bad size": (variable("TLF_TOKENS_GIB", "much"), "variables", "TLF_TOKENS_GIB: expected a number of GiB"),
    "bad allocator": (variable("TLF_CPU_ALLOCATOR", "jemalloc"), "variables", "'jemalloc'"),
    "misspelt variable": (variable("TLF_BAKEND", "cpp"), "variables", "TLF_BAKEND is set, and nothing reads it"),
    "wrong products": (wrong_products, "products", "torch's bfloat16 product on cpu is wrong by"),
    "no loopback": (no_loopback, "processes", "does not reach itself at 127.0.0.1: Network is unreachable"),
    "driver, torch without CUDA": (driver_without_cuda, "gpu", "(570.86.15), and torch is built for CPUs"),
    "a check that fails": (broken_check, "threads", "the check threads ended early: ZeroDivisionError"),
}


def found(check: str, level: str = "fault") -> list[Finding]:
    (one,) = examine([check])
    return [finding for finding in one.findings if finding.level == level]


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, monkeypatch: Patch, tmp_path: Path) -> None:
    plant, check, said = FAULTS[name]
    plant(monkeypatch, tmp_path)
    faults = found(check)
    assert any(said in one.said for one in faults), faults
    assert all(one.remedy for one in faults)


def test_a_healthy_machine_has_no_fault() -> None:
    examined = list(examine(skip=["processes"]))
    assert [one.check for one in examined] == sorted(set(CHECKS.names()) - {"processes"})
    assert not [f for one in examined for f in one.findings if f.level == "fault"]


def test_what_is_not_installed_is_a_note(monkeypatch: Patch, tmp_path: Path) -> None:
    version_of("bitsandbytes", None)(monkeypatch, tmp_path)
    (one,) = [note for note in found("packages", "note") if "bitsandbytes" in note.said]
    assert one.remedy == "pip install 'tinyllava-fast[train]'" and not found("packages")
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert "no C++ compiler" in found("compiler", "note")[0].said and not found("compiler")


def test_a_machine_that_does_not_reach_itself() -> None:
    """For real: a network namespace of its own has no loopback until somebody sets it up."""
    command = ["unshare", "-n", sys.executable, "-c"]
    code = "from tinyllava_fast.doctor.checks.processes import loopback; import sys; sys.stdout.write(loopback())"
    if shutil.which("unshare") is None or subprocess.run([*command, ""], capture_output=True).returncode:
        pytest.skip("this user may not make network namespaces")
    done = subprocess.run([*command, code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "Network is unreachable", done


@pytest.mark.slow
def test_the_whole_command(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    """With torchrun and DeepSpeed in processes of their own."""
    monkeypatch.setattr(kernels, "SECONDS", 0.0)
    code = main(["--json"])
    told = json.loads(capsys.readouterr().out)
    assert code == 0 and told["healthy"], [f for f in told["findings"] if f["level"] == "fault"]
    assert any(f["said"] == "two processes of torchrun meet over gloo" for f in told["findings"])
    assert set(told["seconds"]) == set(CHECKS.names())


def test_unknown_checks_and_exit_codes(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "kernel"]) == 2
    assert main(["--only", "variables"]) == 0 and "no fault" in capsys.readouterr().out
    monkeypatch.setenv("TLF_BACKEND", "cuda")
    assert main(["--only", "variables"]) == 1
    out = capsys.readouterr().out
    assert "FAULT variables" in out and "-> unset TLF_BACKEND" in out and "1 fault, 0 notes" in out


def test_seconds_are_told() -> None:
    assert isinstance(next(examine(["threads"])), Examined) and next(examine(["threads"])).seconds >= 0
