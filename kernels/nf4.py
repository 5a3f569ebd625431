"""NF4 weights on a GPU: a pass that unpacks a weight for cuBLAS's products, and a product of a few rows with it packed.

Unpacking is memory-bound: half a byte read and two written a weight, which lives as long as the product. For the few
rows of decoding that would be four times the bytes of the product itself: there each weight is unpacked in registers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyllava_fast.kernels._common import LAUNCH, TRITON_TYPES, CompileCase, power_of_2
from tinyllava_fast.ops.nf4 import CODEBOOK

BYTES = 1024  # of a program: 8 a thread of 4 warps, so that loads and stores are wide
FEW_ROWS = 16
OUTPUTS, DEPTH = 32, 64
"""Of a product of a few rows: outputs of a program, and bytes of each that it takes at a time (16 each in float32)."""
WARPS, STAGES, PARTS = 4, 3, 4
"""PARTS: programs that share the inputs of an output, so that small layers fill a GPU."""


@triton.jit
def unpack(packed, absmax, codes, out, size, blocksize, BYTES: tl.constexpr):
    """out[i] = codes[nibble i] * absmax[i // blocksize]; a block is even, so both nibbles of a byte share a scale."""
    first = tl.program_id(0).to(tl.int64) * BYTES
    at = first + tl.arange(0, BYTES)
    inside = 2 * at < size
    byte = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    scale = tl.load(absmax + 2 * at // blocksize, mask=inside, other=0.0)
    high = tl.load(codes + (byte >> 4)) * scale
    low = tl.load(codes + (byte & 15)) * scale
    element = 2 * first + tl.arange(0, 2 * BYTES)
    tl.store(out + element, tl.interleave(high, low).to(out.dtype.element_ty), mask=element < size)


@triton.jit
def add_part(
    x, packed, absmax, codes, sums, rows, outputs, columns, x_row, part_bytes, blocksize,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums[part] = x Wᵀ over the inputs of a part, [rows, outputs] float32; columns are even.

    The first nibbles of the bytes are the even inputs, the second ones the odd: two products, and nothing is shuffled.
    """
    part = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    half = columns // 2
    first = part * part_bytes
    end = tl.minimum(first + part_bytes, half)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        here = (n < outputs)[None, :] & (k < end)[:, None]
        at = n.to(tl.int64)[None, :] * half + k[:, None]
        byte = tl.load(packed + at, mask=here, other=0).to(tl.int32)
        scale = tl.load(absmax + 2 * at // blocksize, mask=here, other=0.0)
        high = tl.load(codes + (byte >> 4)) * scale
        low = tl.load(codes + (byte & 15)) * scale
        known = (m < rows)[:, None] & (k < end)[None, :]
        even = tl.load(x + m[:, None] * x_row + 2 * k[None, :], mask=known, other=0.0)
        odd = tl.load(x + m[:, None] * x_row + 2 * k[None, :] + 1, mask=known, other=0.0)
        kind: tl.constexpr = x.dtype.element_ty
        if PRECISION == "widened":
            acc = tl.dot(even.to(tl.float32), high.to(kind).to(tl.float32), acc)
            acc = tl.dot(odd.to(tl.float32), low.to(kind).to(tl.float32), acc)
        else:
            acc = tl.dot(even, high.to(kind), acc, input_precision=PRECISION)
            acc = tl.dot(odd, low.to(kind), acc, input_precision=PRECISION)
    to = (part * rows + m[:, None]) * outputs + n[None, :]
    tl.store(sums + to, acc, mask=(m < rows)[:, None] & (n < outputs)[None, :])


@functools.cache
def _codes(device: torch.device) -> Tensor:
    return torch.tensor(CODEBOOK, dtype=torch.float32, device=device)


def dequantize_nf4(
    packed: Tensor, absmax: Tensor, rows: int, columns: int, blocksize: int, dtype: torch.dtype
) -> Tensor:
    """The weight [rows, columns]; see ops/nf4.py."""
    out = packed.new_empty((rows, columns), dtype=dtype)
    if out.numel():
        with torch.cuda.device_of(packed):
            unpack[(triton.cdiv(packed.numel(), BYTES),)](
                packed.contiguous(), absmax.contiguous(), _codes(packed.device), out, out.numel(), blocksize,
                BYTES=BYTES, num_warps=4, **LAUNCH,
            )  # fmt: skip
    return out


def linear_nf4_fwd(
    x: Tensor, packed: Tensor, absmax: Tensor, rows: int, columns: int, blocksize: int, bias: Tensor | None
) -> Tensor:
    """[N, O]; see ops/nf4.py."""
    if 0 < len(x) <= FEW_ROWS and columns and columns % 2 == 0 and rows:
        return _few(x, packed, absmax, rows, columns, blocksize, bias)
    weight = dequantize_nf4(packed, absmax, rows, columns, blocksize, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def _few(
    x: Tensor, packed: Tensor, absmax: Tensor, outputs: int, columns: int, blocksize: int, bias: Tensor | None
) -> Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    part = max(DEPTH, triton.cdiv(triton.cdiv(columns // 2, PARTS), DEPTH) * DEPTH)
    parts = triton.cdiv(columns // 2, part)
    sums = x.new_empty((parts, len(x), outputs), dtype=torch.float32)
    with torch.cuda.device_of(x):
        fixed = _blocks(x.device.type, len(x), x.dtype)
        add_part[triton.cdiv(outputs, int(fixed["BLOCK_N"])), parts](
            *(x, packed.contiguous(), absmax.contiguous(), _codes(x.device), sums),
            *(len(x), outputs, columns, x.stride(0), part, blocksize),
            **fixed,
            num_warps=WARPS,
            num_stages=STAGES,
            **LAUNCH,
        )
    y = sums.sum(0)
    return (y if bias is None else y + bias).to(x.dtype)


def _blocks(device: str, rows: int, dtype: torch.dtype) -> dict[str, int | str]:
    precision = "widened" if device == "cpu" and dtype == torch.bfloat16 else "ieee"
    outputs, depth = (16, 16) if dtype == torch.float32 else (OUTPUTS, DEPTH)
    return {"BLOCK_M": power_of_2(rows, 16, 16), "BLOCK_N": outputs, "BLOCK_K": depth, "PRECISION": precision}


def linear_nf4_bwd(grad: Tensor, packed: Tensor, absmax: Tensor, rows: int, columns: int, blocksize: int) -> Tensor:
    """dx [N, K]."""
    return grad @ dequantize_nf4(packed, absmax, rows, columns, blocksize, grad.dtype)


def compile_cases() -> Iterator[CompileCase]:
    """Every dtype; the shape does not enter the code."""
    for dtype, kind in TRITON_TYPES.items():
        signature = {"packed": "*u8", "absmax": "*fp32", "codes": "*fp32", "out": f"*{kind}"}
        signature |= {"size": "i32:16", "blocksize": "i32:16"}
        yield CompileCase("unpack", f"blocks of 64, {kind}", unpack, signature, {"BYTES": BYTES}, 4, 3, False)
        types = {"x": f"*{kind}", "packed": "*u8", "absmax": "*fp32", "codes": "*fp32", "sums": "*fp32", "rows": "i32"}
        types |= dict.fromkeys(("outputs", "columns", "x_row", "part_bytes", "blocksize"), "i32:16")
        fixed = _blocks("cuda", FEW_ROWS, dtype)
        has_dot = dtype != torch.float32
        yield CompileCase("add_part", f"a few rows, {kind}", add_part, types, fixed, WARPS, STAGES, has_dot)
