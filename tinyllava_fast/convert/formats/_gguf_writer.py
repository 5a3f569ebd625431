"""GGUF files: which number format each tensor gets, and the writing, one tensor after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from tinyllava_fast.log import log
from tinyllava_fast.pace import EVERY_S, Pace

_BLOCK = 32
"""Numbers that share a scale in q8_0 and q4_0."""
_FLOATS = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
_FILE_TYPES = {
    Kind.F32: gguf.LlamaFileType.ALL_F32,
    Kind.F16: gguf.LlamaFileType.MOSTLY_F16,
    Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Kind.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
}


@dataclass(frozen=True)
class Precision:
    """Number formats of a file. matrix: products. table: embedding and output. narrow: rows that no block divides."""

    matrix: Kind
    table: Kind
    narrow: Kind

    @property
    def projector(self) -> Precision:
        """The tower and the connector are never quantized: they are small, and errors there are in every token."""
        return Precision(self.narrow, self.narrow, self.narrow)

    def of(self, name: str, shape: torch.Size) -> Kind:
        """Return the format of a tensor. What is added or scaled by, row by row, stays in float32."""
        if len(shape) < 2 or "norm" in name or "position_embd" in name or "class_embd" in name:
            return Kind.F32
        if len(shape) == 4:  # a convolution: llama.cpp has it for float16 and float32
            return Kind.F16 if self.narrow is Kind.F16 else Kind.F32
        kind = self.table if name in ("token_embd.weight", "output.weight") else self.matrix
        return self.narrow if shape[-1] % _BLOCK else kind


def precision(weights: str | None, dtype: torch.dtype) -> Precision:
    """Return the formats of a model. weights: q8_0, q4_0 or None for dtype.

    As in llama.cpp's own files, q4_0 keeps the embedding and the output finer; what cannot be quantized is float16.
    """
    if weights is None:
        kind = _FLOATS[dtype]
        return Precision(kind, kind, kind)
    return Precision(Kind[weights.upper()], Kind.Q8_0, Kind.F16)


def write_file(
    path: Path,
    arch: str,
    kinds: Precision,
    describe: Callable[[gguf.GGUFWriter], None],
    tensors: Callable[[], Iterable[tuple[str, Tensor]]],
) -> None:
    """Write a GGUF file; beside the model it takes the memory of one tensor.

    describe: adds the settings. tensors: yields all tensors by llama.cpp's names, the same each time it is called.
    """
    writer = gguf.GGUFWriter(path, arch)
    try:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(_FILE_TYPES[kinds.matrix])
        describe(writer)
        count = 0
        for name, tensor in tensors():
            kind = kinds.of(name, tensor.shape)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.numel() // block * size, kind)
            count += 1
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        pace = Pace(wait_s=EVERY_S)
        for done, (name, tensor) in enumerate(tensors()):
            if pace.due():
                log.info("%s: %d of %d tensors", path.name, done, count)
            writer.write_tensor_data(_stored(tensor, kinds.of(name, tensor.shape)))
    finally:
        writer.close()


def _stored(tensor: Tensor, kind: Kind) -> np.ndarray:
    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    if kind is Kind.F32:
        return values
    return values.astype(np.float16) if kind is Kind.F16 else gguf.quants.quantize(values, kind)
