"""The operations that torch has no fast answer for; each one's meaning, C++ and (later) Triton kernels share a name."""

from tinyllava_fast.ops.linear_cross_entropy import linear_cross_entropy
from tinyllava_fast.ops.pack import pack_plan
from tinyllava_fast.ops.packed_attention import packed_attention
from tinyllava_fast.ops.splice import splice

__all__ = ["linear_cross_entropy", "pack_plan", "packed_attention", "splice"]
