"""`tlf-bench triton`: every Triton kernel compiled for every architecture, without a GPU, and what ptxas made of it.

A register that spills, a tile that outgrows shared memory or a product that misses the tensor cores costs more than any
tuning gains, and all three show in the machine code. The committed table is what they must not fall behind.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

import tinyllava_fast.kernels as package
from tinyllava_fast.bench import report
from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.kernels._common import LAUNCH, CompileCase, launches_of

TABLE = Path(__file__).parent / "results" / "triton_resources.json"
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
"""Most shared memory of a block, in bytes (CUDA programming guide, compute capabilities)."""
ARCHS = ("sm_80", "sm_90")
"""Of the committed table, which the launch settings are chosen for. sm_100 compiles as well; three attention shapes
need 8 bytes of local memory there."""
REGISTER_SLACK = 1.1
MMA = re.compile(r"\b(?:[A-Z]?G?MMA|UTC[A-Z]*MMA)\b")  # HMMA, IMMA, QMMA; wgmma: HGMMA; tcgen05: UTCHMMA
ALIGNED = [["tt.divisibility", 16]]


class Kernel(TypedDict):
    """A compiled kernel."""

    name: str  # <file>.<kernel>
    arch: str
    shape: str
    registers: int
    spills: int  # bytes of local memory a thread needs
    shared_bytes: int
    mma: int  # tensor-core instructions


class Table(TypedDict):
    """The report, and the committed table."""

    kernels: list[Kernel]
    skipped: dict[str, str]  # architecture: reason
    versions: dict[str, str]


def discover(arch: str = ARCHS[0]) -> Iterator[tuple[str, CompileCase]]:
    """(kernel file, case) of every file in kernels/, with the launch settings of that architecture.

    UserError for a file without compile_cases.
    """
    for found in pkgutil.iter_modules(package.__path__):
        if found.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package.__name__}.{found.name}")
        if not hasattr(module, "compile_cases"):
            raise UserError(f"kernels/{found.name}.py has no compile_cases(); it must yield a CompileCase per kernel")
        with launches_of(arch):
            cases = list(module.compile_cases())
        for case in cases:
            yield found.name, case


def measure(archs: Sequence[str] = ARCHS, keep: Callable[[str, CompileCase], bool] = lambda *_: True) -> Table:
    """Compile the kept (file, case) pairs for every architecture.

    UserError for an unknown architecture, or where kernels are interpreted.
    """
    for arch in archs:
        if arch not in SHARED_LIMIT:
            raise UserError(f"--arch {arch!r}; {nearest(arch, SHARED_LIMIT)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET=1 is set: kernels are interpreted, not compiled; unset it")
    rows: list[Kernel] = []
    skipped: dict[str, str] = {}
    for arch in archs:
        if (reason := _why_not(arch)) is not None:
            skipped[arch] = reason
            continue
        rows += [_resources(file, case, arch) for file, case in discover(arch) if keep(file, case)]
    versions = {"triton": triton.__version__, "torch": torch.__version__, "ptxas": triton.knobs.nvidia.ptxas.version}
    return {"kernels": rows, "skipped": skipped, "versions": versions}


def problems(result: Table, committed: Table | None) -> list[str]:
    """Return what is wrong with freshly compiled kernels, alone and against the committed table; one sentence each."""
    dots = {(f"{file}.{case.name}", case.shape): case.has_dot for file, case in discover()}
    before = {_key(row): row for row in committed["kernels"]} if committed else {}
    archs = {row["arch"] for row in before.values()}
    found = [f"{a}: in the table, but {reason}" for a, reason in result["skipped"].items() if a in archs]
    note = ""
    if committed and committed["versions"] != result["versions"]:
        note = f" (the table was made by {committed['versions']})"
    for row in result["kernels"]:
        where = f"{row['name']} [{row['shape']}] on {row['arch']}"
        if row["spills"]:
            found.append(f"{where}: {row['spills']} bytes of local memory a thread; registers spill")
        if dots[row["name"], row["shape"]] and row["mma"] == 0:
            found.append(f"{where}: no tensor-core instruction in a kernel with products")
        limit = SHARED_LIMIT[row["arch"]]
        if row["shared_bytes"] > limit:
            found.append(f"{where}: {row['shared_bytes']} bytes of shared memory, {row['arch']} has {limit}")
        old = before.get(_key(row))
        if old is not None and row["registers"] > REGISTER_SLACK * old["registers"]:
            found.append(f"{where}: {row['registers']} registers, {old['registers']} in the table{note}")
    return found


def missing(committed: Table) -> list[str]:
    """Return the rows that the table lacks or has too many of: every case of every file once per architecture."""
    archs = [a for a in ARCHS if a not in committed.get("skipped", {})]
    wanted = Counter((f"{file}.{case.name}", case.shape, arch) for file, case in discover() for arch in archs)
    present = Counter(_key(row) for row in committed["kernels"])
    return [
        f"{name} [{shape}] on {arch}: {present[name, shape, arch]} rows, expected {wanted[name, shape, arch]}"
        for name, shape, arch in sorted(set(wanted) | set(present))
        if present[name, shape, arch] != wanted[name, shape, arch]
    ]


def read_table(path: Path = TABLE) -> Table:
    """Return the committed table; UserError if there is none or it does not parse."""
    try:
        table: Table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read the committed table ({error}); write it with --json") from error
    return table


def show(result: Table) -> None:
    """Print one line a kernel, shape and architecture."""
    columns = {"kernel": "{name}", "shape": "{shape}", "arch": "{arch}", "registers": "{registers}"}
    columns |= {"spills": "{spills}", "shared": "{shared_bytes}", "mma": "{mma}"}
    title = f"Triton {result['versions']['triton']} kernels, compiled offline; spills and shared memory in bytes"
    report.table(title, columns, result["kernels"])
    if result["skipped"]:
        report.show("Skipped", ["arch", "reason"], [list(pair) for pair in result["skipped"].items()])


def _key(row: Kernel) -> tuple[str, str, str]:
    return row["name"], row["shape"], row["arch"]


def _compile(case: CompileCase, arch: str) -> CompiledKernel:
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constexprs else case.signature[name] for name in names}
    attributes = {}
    for index, name in enumerate(names):
        kind, _, multiple = signature[name].partition(":")
        signature[name] = kind
        if kind.startswith("*") or multiple == "16":
            attributes[index,] = ALIGNED
    source = ASTSource(case.kernel, signature, constexprs=case.constexprs, attrs=attributes)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return triton.compile(
        source, target=target, options={"num_warps": case.num_warps, "num_stages": case.num_stages, **LAUNCH}
    )


def _resources(file: str, case: CompileCase, arch: str) -> Kernel:
    compiled = _compile(case, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _cuobjdump("-res-usage", cubin.name)
        sass = _cuobjdump("-sass", cubin.name)
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "name": f"{file}.{case.name}",
        "arch": arch,
        "shape": case.shape,
        "registers": numbers["REG"],
        "spills": numbers["STACK"] + numbers["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "mma": len(MMA.findall(sass)),
    }


def _cuobjdump(flag: str, path: str) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, flag, path], check=True, capture_output=True, text=True).stdout


@triton.jit
def _probe(out: tl.tensor) -> None:
    tl.store(out, 1.0)


def _why_not(arch: str) -> str | None:
    """Return None if this triton compiles for the architecture at all, else its complaint."""
    try:
        _compile(CompileCase("probe", "", _probe, {"out": "*fp32"}, {}, 1, 1, False), arch)
    except Exception as error:  # whatever the compiler raises
        return f"triton {triton.__version__} cannot: {str(error).strip() or type(error).__name__}"[:300]
    return None
