"""The Triton kernels of packed attention and merge_states without a GPU: interpreted, and compiled offline."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from tinyllava_fast.kernels import merge_states, packed_attention  # noqa: E402
from tinyllava_fast.kernels._common import ATTENTION, CompileCase, attention_launch  # noqa: E402

# bytes of shared memory a block may have (CUDA programming guide); sm_80 has 163 KB, but its settings also serve sm_86
SHARED = {80: 99 << 10, 90: 227 << 10}
ALIGNED = [["tt.divisibility", 16]]


@pytest.mark.slow
def test_interpreted_kernels_agree_with_the_reference() -> None:
    script = Path(__file__).with_name("triton_packed_attention.py")
    path = os.pathsep.join([str(script.parents[2]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout) >= 40


def resources(case: CompileCase, arch: int) -> dict[str, int]:
    """Registers and bytes of stack a thread, bytes of shared memory a block, tensor-core instructions."""
    names = case.kernel.arg_names
    assert set(case.signature) | set(case.constexprs) == set(names), case.name
    types = {a: t.split(":")[0] for a, t in case.signature.items()}
    aligned = [a for a, t in case.signature.items() if t.startswith("*") or t.endswith(":16")]
    source = ASTSource(
        case.kernel,
        {a: types.get(a, "constexpr") for a in names},
        case.constexprs,
        {(names.index(a),): ALIGNED for a in aligned},
    )
    options: dict[str, Any] = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout)
    assert found, told.stdout
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": compiled.metadata.shared,
        "mma": len(re.findall(r"mma\.sync|wgmma\.mma_async", compiled.asm["ptx"])),
    }


def chosen() -> list[CompileCase]:
    """What small models run; every other shape is in the table of `tlf-bench triton`."""
    wanted = ("TinyLlama 32/4 x 64 causal bf16", "Gemma-2B 8/1 x 256 causal bf16")
    return [c for c in packed_attention.compile_cases() if c.shape in wanted]


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("case", chosen(), ids=lambda c: f"{c.name}-{c.shape}".replace(" ", "_"))
def test_offline_compilation(case: CompileCase, arch: int) -> None:
    got = resources(case, arch)
    assert got["stack"] == 0, f"{got} spills"
    assert got["shared"] <= SHARED[arch]
    assert got["mma"] > 0


def test_every_setting_and_shape_is_declared() -> None:
    cases = list(packed_attention.compile_cases())
    shapes = " ".join(c.shape for c in cases)
    assert all(name in shapes for name in ("TinyLlama", "Phi-2", "Gemma-2B", "SigLIP-so400m", "windowed", "capped"))
    assert {c.name for c in cases} == {"attend", "differentiate_queries", "differentiate_keys"}
    assert len({(c.name, c.shape) for c in [*cases, *merge_states.compile_cases()]}) >= 33
    for bucket, kind in ATTENTION:
        dtype = torch.float32 if kind == "float" else torch.bfloat16
        assert {"fwd", "dq", "dkv", "decode"} == set(attention_launch("cuda", bucket, dtype))
