"""The calls for which a kernel beats torch: one table by op, instruction set, dtype and shape, with the measurements.

Machines A (2 cores, Zen 4: AVX-512 BF16), B (2 cores, Xeon: AMX) and C (2 cores, Zen 5), all in bfloat16 with two
threads unless said otherwise; docs/LOG.md has the whole measurements. "ours / torch" are times of one call. Whether a
kernel *can* run is said by ``Op.why_not``, not here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tinyllava_fast.ops import _cpp


class Size(NamedTuple):
    """Bounds of one size of a call, both inclusive, and what it has to be a multiple of."""

    name: str
    least: int = 0
    most: int = 1 << 62
    multiple: int = 1


class Rule(NamedTuple):
    """The calls for which a kernel wins; None: on any instruction set, or device, and in any dtype."""

    sizes: tuple[Size, ...] = ()
    isas: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None


_NARROW = (torch.bfloat16,)
_SIDES = tuple(Size(name, 64) for name in ("rows", "columns", "depth"))

TABLE: dict[str, tuple[Rule, ...]] = {
    # A, ours / torch in us. 576 to 1,536: 82 / 163 at 1 row, 205 / 235 at 16, 317 / 305 at 32; 2,048 to 5,632:
    # 1,687 / 1,893 at 16, 3,384 / 2,748 at 32. B: torch takes 1.1-1.4 times as long at 8 and 16 rows. On a
    # GPU dense products are torch's.
    "decode_linear": (Rule((Size("rows", most=16),), _cpp.ISAS),),
    # A, 576 to 1,536 at 64 rows: 425 us, 497 through a dequantized weight (2,048 to 5,632: 4,825 and 36,801).
    "decode_linear int8": (Rule((Size("rows", most=64),)),),
    # B, ours / torch in ms, 240 rows: 576 to 960 0.12 / 0.20, 576 to 3,072 0.34 / 0.62; 196 rows, 3,072 to 768
    # 0.53 / 0.91. Without tiles it runs at a hundredth of torch's speed.
    "prefill_linear": (Rule((), ("amx",), _NARROW),),
    # B, ours / torch in ms. x Wᵀ 3,584 x 576 x 1,536 1.93 / 2.51, dyᵀ x 1,536 x 3,584 x 576 3.05 / 5.74; a tie for
    # dy W 3,584 x 1,536 x 576. Smaller products than these bounds were not measured.
    "gemm": (Rule((*_SIDES, Size("work", 1 << 24)), ("amx",), _NARROW),),
    # A transposed copy ahead of torch's product by a transposed left factor. B: that product runs at half its speed.
    # A, dyᵀ x 4,096 x 1,536 x 576: 18.5 ms as it lies, 22.3 with the copy.
    "transpose": (Rule((), ("amx",), _NARROW),),
    # C, a step of SmolLM2-135M: r = 16 2.66 s, 3.35 by torch's products; r = 128 3.32 and 3.70. No larger rank than 512
    # was measured. The kernels take pairs of columns.
    "lora_linear": (Rule((Size("rank", 1, 512, multiple=2), Size("columns", multiple=2)), ("avx512bf16",), _NARROW),),
    # The packed weight itself against a dequantized one. A, 2,048 to 5,632 in us: 2,119 and 3,460 at 32 rows, 3,143 and
    # 4,133 at 48. Elsewhere up to about 16 rows (one thread of B, busy): 3.5 and 4.8 ms, 2,048 to 2,048; a tie for 576
    # to 1,536.
    "linear_nf4": (
        Rule(
            (Size("rows", most=48), Size("columns", multiple=64), Size("blocksize", 64, 64)), ("avx512bf16",), _NARROW
        ),
        Rule((Size("rows", most=16), Size("columns", multiple=2))),
    ),
    # Images, all of one size. One core of A, 8 of SigLIP-B, forward + backward, ours / torch in ms: 28 / 65, in float32
    # 42 / 46. Elsewhere the op would run as its dense reference, over all images at once.
    "packed_attention of images": (Rule((), _cpp.ISAS, (torch.float32, torch.bfloat16)),),
    # A whole decoding step in one call (infer/fast_model/fused_step.py) against one call for each layer. It wins at 32
    # sequences in bfloat16; more were not measured.
    "decode_step": (
        Rule((Size("rows", most=16),), None, (torch.float32,)),
        Rule((Size("rows", most=64),), None, _NARROW),
    ),
    "decode_step quantized": (Rule((Size("rows", most=64),)),),
}

COMPILE_SECONDS_A_LAYER = {
    # Two cores of B, SmolLM2-135M under SigLIP-B/16-224, from an empty cache.
    "training": 1.7,
    # One core.
    "decoding": 1.5,
    # Never worth it. One sequence of SmolLM2-135M: 78 ms a step from a graph, 18 without one.
    "fused decoding": math.inf,
}
"""Seconds that torch.compile takes for each layer."""
# Steps of the same training, on the same machine:
EAGER_RATE = 0.22
"""FLOP/s of an eager training step as a share of the GEMM peak."""
COMPILED_SAVES = 0.21
"""Share of an eager training step that compiling saves."""


def faster(op: str, x: Tensor, **sizes: int) -> bool:
    """Return whether the table says that the kernel beats torch for x's device and dtype and these sizes."""
    isa = _cpp.isa() if x.is_cpu else x.device.type
    for rule in TABLE[op]:
        here = (rule.isas is None or isa in rule.isas) and (rule.dtypes is None or x.dtype in rule.dtypes)
        if here and _fits(rule, sizes):
            return True
    return False


def _fits(rule: Rule, sizes: dict[str, int]) -> bool:
    for name, least, most, multiple in rule.sizes:  # no all(...): torch.compile traces it, with sizes that are symbols
        if sizes[name] < least or sizes[name] > most or sizes[name] % multiple:
            return False
    return True


def most_rows(op: str, dtype: torch.dtype | None = None) -> int:
    """Return the most rows for which any rule of the op says that its kernel wins. dtype: of x; None: any."""
    rules = [rule for rule in TABLE[op] if None in (dtype, rule.dtypes) or dtype in (rule.dtypes or ())]
    return max(size.most for rule in rules for size in rule.sizes if size.name == "rows")
