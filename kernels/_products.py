"""The parts that kernels with products of whole matrices share: the order of tiles and their sizes."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tinyllava_fast.kernels._common import LAUNCH


@triton.jit
def tile_of(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row tile, column tile) of this program; groups of 8 row tiles share their columns in the L2 cache."""
    program = tl.program_id(0)
    down = tl.cdiv(rows, BLOCK_M)
    across = tl.cdiv(columns, BLOCK_N)
    group = program // (8 * across)
    height = tl.minimum(down - group * 8, 8)
    inside = program % (8 * across)
    return group * 8 + inside % height, inside // height


def tiles(m: int, n: int, k: int, warps: int, stages: int, *, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return constants and options of a launch; small tiles in the interpreter, so that tests cross them."""
    if device == "cpu":
        m, n, k = 16, 32, 16
    precision = "widened" if device == "cpu" and dtype == torch.bfloat16 else "ieee"
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PRECISION": precision}
    return {**blocks, "num_warps": warps, "num_stages": stages, **LAUNCH}
