"""The Triton kernels of packed attention and merge_states, interpreted; `tlf-bench triton` compiles them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tinyllava_fast.bench.triton_resources import read_table
from tinyllava_fast.kernels import merge_states, packed_attention
from tinyllava_fast.kernels._common import ATTENTION, attention_launch


@pytest.mark.slow
def test_interpreted_kernels_agree_with_the_reference() -> None:
    script = Path(__file__).with_name("triton_packed_attention.py")
    path = os.pathsep.join([str(script.parents[2]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout) >= 40


def test_shared_memory_also_fits_smaller_cards() -> None:
    """One table of settings serves every architecture: what sm_80 takes must fit the 99 KB of a block on sm_86."""
    rows = [r for r in read_table()["kernels"] if r["name"].startswith("packed_attention.") and r["arch"] == "sm_80"]
    assert len(rows) > 20 and max(r["shared_bytes"] for r in rows) <= 99 << 10


def test_every_setting_and_shape_is_declared() -> None:
    cases = list(packed_attention.compile_cases())
    shapes = " ".join(c.shape for c in cases)
    assert all(name in shapes for name in ("TinyLlama", "Phi-2", "Gemma-2B", "SigLIP-so400m", "windowed", "capped"))
    assert {c.name for c in cases} == {"attend", "differentiate_queries", "differentiate_keys"}
    assert len({(c.name, c.shape) for c in [*cases, *merge_states.compile_cases()]}) >= 33
    for bucket, kind in ATTENTION:
        dtype = torch.float32 if kind == "float" else torch.bfloat16
        assert {"fwd", "dq", "dkv", "decode"} == set(attention_launch("cuda", bucket, dtype))
