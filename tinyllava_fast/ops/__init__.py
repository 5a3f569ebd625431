"""The operations that torch has no fast answer for; each one's meaning, C++ and Triton kernels share a name."""

from tinyllava_fast.ops.linear_cross_entropy import linear_cross_entropy
from tinyllava_fast.ops.merge_states import merge_states
from tinyllava_fast.ops.pack import pack_plan
from tinyllava_fast.ops.packed_attention import packed_attention
from tinyllava_fast.ops.splice import splice

__all__ = ["linear_cross_entropy", "merge_states", "pack_plan", "packed_attention", "splice"]
