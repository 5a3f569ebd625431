"""linear_nf4 and dequantize_nf4, against bitsandbytes' functions for the same packed weight."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from tinyllava_fast.bench.case import FORWARD, SUITE, Candidate, Case, Run, Setting, Work, lacking, nbytes, works
from tinyllava_fast.ops import NF4, dequantize_nf4, linear_nf4
from tinyllava_fast.ops._op import force_backend
from tinyllava_fast.ops.nf4 import random_nf4

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

INPUTS, OUTPUTS = 2048, 5632
"""The first projection of TinyLlama's MLP."""


@SUITE.register("linear_nf4")
def linear_cases(setting: Setting) -> Iterator[Case]:
    """One row, few, and many: generation, batched generation, training."""
    for rows in (3,) if setting.quick else (1, 16, 512):
        yield _linear(setting, rows)


@SUITE.register("dequantize_nf4")
def dequantize_cases(setting: Setting) -> Iterator[Case]:
    """The whole weight into bfloat16."""
    nf4 = _weight(setting)

    def reference() -> Tensor:
        with force_backend("reference"):
            return dequantize_nf4(*nf4)

    run: dict[str, Candidate] = {
        "torch": reference,
        "bitsandbytes": lacking("bitsandbytes") or _dequantize(nf4),
        "ours": lambda: dequantize_nf4(*nf4),
    }
    work = {FORWARD: Work(0.0, nbytes(nf4.packed, nf4.absmax) + 2 * nf4.shape[0] * nf4.shape[1])}
    yield Case("dequantize_nf4", f"K={nf4.shape[1]} O={nf4.shape[0]}", run, work)


def _linear(setting: Setting, rows: int) -> Case:
    nf4 = _weight(setting)
    outputs, width = nf4.shape
    x = setting.randn(rows, width)

    def plain() -> Tensor:
        return functional.linear(x, dequantize_nf4(*nf4, x.dtype))

    run: dict[str, Candidate] = {
        "torch, W dequantized whole by ours": plain,
        "bitsandbytes": lacking("bitsandbytes") or _multiply(x, nf4),
        "bitsandbytes, repacked": _no_repacking(setting) or _repacked(x, nf4),
        "ours": lambda: linear_nf4(x, *nf4),
    }
    flops, packed = 2.0 * rows * width * outputs, nbytes(nf4.packed, nf4.absmax)
    work = works(flops, nbytes(x) + packed, rows * outputs * x.element_size(), nbytes(x), backward=1.0)
    # the smallest of the ratios at 1 and 16 rows is the headline's
    headline = {"nf4_vs_bitsandbytes": "bitsandbytes"} if rows <= 16 else {}
    label = f"N={rows} K={width} O={outputs}"
    return Case("linear_nf4", label, run, work, (x,), (nf4.packed, nf4.absmax), headline)


def _weight(setting: Setting) -> NF4:
    outputs, width = (160, 64) if setting.quick else (OUTPUTS, INPUTS)  # bitsandbytes needs a multiple of 64 on a CPU
    packed, absmax, *_ = random_nf4(setting.generator, outputs, width, 64)
    return NF4(packed.to(setting.device), absmax.to(setting.device), (outputs, width))


def _state(nf4: NF4, dtype: torch.dtype) -> tuple[Tensor, QuantState]:
    from bitsandbytes.functional import QuantState, get_4bit_type

    code = get_4bit_type("nf4", device=str(nf4.packed.device))
    return nf4.packed[:, None], QuantState(nf4.absmax, torch.Size(nf4.shape), code, nf4.blocksize, "nf4", dtype)


def _multiply(x: Tensor, nf4: NF4) -> Run:
    from bitsandbytes import matmul_4bit

    packed, state = _state(nf4, x.dtype)
    return lambda: matmul_4bit(x, packed.t(), state)


def _no_repacking(setting: Setting) -> str | None:
    if (reason := lacking("bitsandbytes")) is not None:
        return reason
    from bitsandbytes.functional import has_avx512bf16

    if setting.device != "cpu" or setting.dtype != torch.bfloat16 or not has_avx512bf16():
        return "its evaluation mode repacks weights for bfloat16 on CPUs with AVX512-BF16 only"
    return None


def _repacked(x: Tensor, nf4: NF4) -> Run:
    """As Linear4bit does it in evaluation mode; rounds the scales, so its result differs slightly."""
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    packed, state = _state(nf4, x.dtype)
    weight, state = _convert_weight_packed_for_cpu(packed, state)

    def run() -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError("its repacked weights have no backward pass")
        return matmul_4bit(x, weight, state)

    return run


def _dequantize(nf4: NF4) -> Run:
    import_module("bitsandbytes")  # registers its ops
    op = torch.ops.bitsandbytes.dequantize_4bit.default
    return lambda: op(nf4.packed, nf4.absmax, 64, "nf4", nf4.shape, torch.bfloat16)
