"""The operations that torch has no fast answer for; each one's meaning, C++ and Triton kernels share a name."""

from tinyllava_fast.ops.connector_mlp import connector_mlp
from tinyllava_fast.ops.decode_attention import decode_attention
from tinyllava_fast.ops.decode_linear import Int8, quantize_int8
from tinyllava_fast.ops.linear import linear
from tinyllava_fast.ops.linear_cross_entropy import linear_cross_entropy
from tinyllava_fast.ops.lora_linear import lora_linear
from tinyllava_fast.ops.nf4 import NF4, dequantize_nf4, linear_nf4, quantize_nf4, unpack_nf4
from tinyllava_fast.ops.pack import pack_plan
from tinyllava_fast.ops.packed_attention import packed_attention
from tinyllava_fast.ops.splice import splice

__all__ = [
    "NF4",
    "Int8",
    "connector_mlp",
    "decode_attention",
    "dequantize_nf4",
    "linear",
    "linear_cross_entropy",
    "linear_nf4",
    "lora_linear",
    "pack_plan",
    "packed_attention",
    "quantize_int8",
    "quantize_nf4",
    "splice",
    "unpack_nf4",
]
