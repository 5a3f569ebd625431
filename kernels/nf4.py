"""NF4 weights on a GPU: one pass that unpacks a weight; its products are cuBLAS's, over the unpacked weight.

Memory-bound: half a byte read and two written a weight. The unpacked weight lives as long as the product.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyllava_fast.kernels._common import LAUNCH, TRITON_TYPES, CompileCase
from tinyllava_fast.ops.nf4 import CODEBOOK

BYTES = 1024  # of a program: 8 a thread of 4 warps, so that loads and stores are wide


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
    weight = dequantize_nf4(packed, absmax, rows, columns, blocksize, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def linear_nf4_bwd(grad: Tensor, packed: Tensor, absmax: Tensor, rows: int, columns: int, blocksize: int) -> Tensor:
    """dx [N, K]."""
    return grad @ dequantize_nf4(packed, absmax, rows, columns, blocksize, grad.dtype)


def compile_cases() -> Iterator[CompileCase]:
    """Every dtype; the shape does not enter the code."""
    for kind in TRITON_TYPES.values():
        signature = {"packed": "*u8", "absmax": "*fp32", "codes": "*fp32", "out": f"*{kind}"}
        signature |= {"size": "i32:16", "blocksize": "i32:16"}
        yield CompileCase("unpack", f"blocks of 64, {kind}", unpack, signature, {"BYTES": BYTES}, 4, 3, False)
