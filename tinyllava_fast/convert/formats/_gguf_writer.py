"""A GGUF file being written: which number format each tensor gets, and the file itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

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
        if "patch_embd" in name:  # a convolution: llama.cpp has it for float16 and float32
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


class Writer(gguf.GGUFWriter):
    """gguf's writer, which takes torch tensors and stores each in its format."""

    def __init__(self, path: Path, arch: str, kinds: Precision) -> None:
        super().__init__(path, arch)
        self.kinds = kinds
        self.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self.add_file_type(_FILE_TYPES[kinds.matrix])

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor under llama.cpp's name."""
        kind = self.kinds.of(name, tensor.shape)
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        stored = values if kind is Kind.F32 else _rounded(values, kind)
        self.add_tensor(name, stored, raw_dtype=kind)


def _rounded(values: np.ndarray, kind: Kind) -> np.ndarray:
    return values.astype(np.float16) if kind is Kind.F16 else gguf.quants.quantize(values, kind)


@contextmanager
def open_writer(path: Path, arch: str, kinds: Precision) -> Iterator[Writer]:
    """A writer whose file is complete when the block ends without an exception."""
    writer = Writer(path, arch, kinds)
    try:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
