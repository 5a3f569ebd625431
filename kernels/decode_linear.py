"""Triton kernel of ops/decode_linear.py: a few rows against int8 weights, widened on their way to the product.

Memory-bound: a weight is one byte, read once for all rows. Dense weights are left to torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyllava_fast.kernels._common import LAUNCH, TRITON_TYPES, CompileCase, power_of_2

OUTPUTS, DEPTH = 32, 128
"""Outputs of a program, and inputs that it takes at a time; of exact float32 products more than 16 and 64 spill."""
WARPS, STAGES = 4, 3
PARTS = 4
"""Programs that share the inputs of an output: 576 outputs alone would be 18 programs for 132 multiprocessors."""


@triton.jit
def add_part(
    x, weight, sums, rows, outputs, columns, x_row, part_columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums[part] = x Qᵀ over the inputs of a part, [rows, outputs] float32."""
    part = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    first = part * part_columns
    end = tl.minimum(first + part_columns, columns)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(x + m[:, None] * x_row + k[None, :], mask=(m < rows)[:, None] & (k < end)[None, :], other=0.0)
        at = n.to(tl.int64)[None, :] * columns + k[:, None]
        held = tl.load(weight + at, mask=(n < outputs)[None, :] & (k < end)[:, None], other=0)
        if PRECISION == "widened":
            acc = tl.dot(left.to(tl.float32), held.to(tl.float32), acc)
        else:
            acc = tl.dot(left, held.to(left.dtype), acc, input_precision=PRECISION)
    to = (part * rows + m[:, None]) * outputs + n[None, :]
    tl.store(sums + to, acc, mask=(m < rows)[:, None] & (n < outputs)[None, :])


def decode_linear_fwd(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """[N, O] for int8 weights; see ops/decode_linear.py."""
    assert scale is not None  # noqa: S101 triton_supports refuses dense weights
    x, weight = x if x.stride(1) == 1 else x.contiguous(), weight.contiguous()
    (rows, columns), outputs = x.shape, len(weight)
    part = max(DEPTH, triton.cdiv(triton.cdiv(columns, PARTS), DEPTH) * DEPTH)
    parts = max(1, triton.cdiv(columns, part))
    sums = x.new_empty((parts, rows, outputs), dtype=torch.float32)
    if columns == 0:
        sums.zero_()
    elif sums.numel():
        with torch.cuda.device_of(x):
            fixed = _blocks(x.device.type, rows, x.dtype)
            add_part[triton.cdiv(outputs, int(fixed["BLOCK_N"])), parts](
                *(x, weight, sums, rows, outputs, columns, x.stride(0), part),
                **fixed,
                num_warps=WARPS,
                num_stages=STAGES,
                **LAUNCH,
            )
    y = sums.sum(0) * scale
    return (y if bias is None else y + bias).to(x.dtype)


def _blocks(device: str, rows: int, dtype: torch.dtype) -> dict[str, int | str]:
    precision = "widened" if device == "cpu" and dtype == torch.bfloat16 else "ieee"
    outputs, depth = (16, 64) if dtype == torch.float32 else (OUTPUTS, DEPTH)
    return {"BLOCK_M": power_of_2(rows, 16, 64), "BLOCK_N": outputs, "BLOCK_K": depth, "PRECISION": precision}


def compile_cases() -> Iterator[CompileCase]:
    """A few rows and the most."""
    for rows, dtype in ((1, torch.bfloat16), (64, torch.bfloat16), (16, torch.float16), (16, torch.float32)):
        kind = TRITON_TYPES[dtype]
        types = {"x": f"*{kind}", "weight": "*i8", "sums": "*fp32", "rows": "i32", "outputs": "i32:16"}
        types |= {"columns": "i32:16", "x_row": "i32:16", "part_columns": "i32:16"}
        has_dot, fixed = dtype != torch.float32, _blocks("cuda", rows, dtype)
        yield CompileCase("add_part", f"{rows} rows {kind}", add_part, types, fixed, WARPS, STAGES, has_dot)
