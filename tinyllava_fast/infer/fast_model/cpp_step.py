"""A decoder's whole step in one call: the newest token of each sequence through every layer.

    x   = embedding[id]
    q, k, v = Wqkv norm(x) + bias;  q, k = rotate(norm?(q)), rotate(norm?(k));  k, v -> the sequence's next pool row
    x  += Wo attention(q, the sequence's rows and those of its prefix)
    x  += Wdown (silu(gate) up),  gate, up = Wgate_up norm(x)         after the last layer: norm(x)

Layer by layer the same is decoder_layer.py, its reference, some 19,000 Python calls a token for 30 layers; here the
threads meet at barriers instead. CPU only, inference only: rows of the pool are written.
Legend: R sequences, D hidden width, H, Hkv heads, Dh head size, F inner width, P pool rows, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._attention_args import MAX_HEAD_DIM
from tinyllava_fast.ops._check import expect
from tinyllava_fast.ops.decode_linear import Int8
from tinyllava_fast.ops.nf4 import NF4

OP = "decode_step"
DTYPES = (torch.float32, torch.bfloat16)
Weight = Tensor | Int8 | NF4


class Product(NamedTuple):
    """y = x Wᵀ + bias."""

    weight: Weight  # [O, K]
    bias: Tensor | None = None  # [O]


class StepLayer(NamedTuple):
    """The memory that one layer of a step reads, and the rows it writes."""

    input_norm: Tensor  # [D]
    post_norm: Tensor  # [D]
    qkv: Product  # D to (H + 2 Hkv) Dh
    o: Product  # H Dh to D
    gate_up: Product  # D to 2 F
    down: Product  # F to D
    k: Tensor  # [P, Hkv, Dh]
    v: Tensor  # [P, Hkv, Dh]
    q_norm: Tensor | None = None  # [Dh]
    k_norm: Tensor | None = None  # [Dh]
    window: int = 0  # own rows that a query sees; 0: all


class StepPlan:
    """A model and its pool as the kernel takes them. It keeps the memory that it points to alive."""

    def __init__(
        self,
        layers: Sequence[StepLayer],
        embedding: Tensor | Int8,
        norm: Tensor,
        *,
        heads: int,
        eps: float,
        scale: float,
    ) -> None:
        """embedding: [V, D]. norm: [D], the last one. eps: of every norm. scale: of the products of q and k.

        Raises ValueError for shapes, dtypes, devices and tensors with gaps.
        """
        self._held: list[Tensor] = []
        self.dtype, self.width = norm.dtype, len(norm)
        self._layers = layers
        rows, kv_heads, size = layers[0].k.shape
        self._heads, self._kv_heads, self._size, self._rows = heads, kv_heads, size, rows
        if self.dtype not in DTYPES or not norm.is_cpu:
            raise ValueError(f"{OP}: it runs on CPUs in float32 or bfloat16, got {self.dtype} on {norm.device}")
        if size % 2 or size > MAX_HEAD_DIM or heads % kv_heads:
            raise ValueError(f"{OP}: {heads} heads of {kv_heads} keys, size {size}: even, at most {MAX_HEAD_DIM}")
        self._inner = _shape(layers[0].down.weight)[1]
        table = np.array([self._layer(layer) for layer in layers], dtype=np.int64)
        values, factors = embedding if isinstance(embedding, Int8) else (embedding, None)
        vocab = values.shape[0]
        named = (self._matrix("embedding", values, factors, vocab, self.width), vocab, self._vector("norm", norm))
        (address, scales), words, last = named
        self._table = table
        sizes = (len(layers), self.width, heads, kv_heads, size, self._inner, rows)
        self._model = np.array([*sizes, address, scales, words, last, 0, 0, 0], dtype=np.int64)
        self._angles: tuple[Tensor, Tensor] | None = None
        self._run = _cpp.extension().decode_step
        self._fixed = (float(eps), float(scale), _cpp.DTYPE_CODES[self.dtype])
        self._pointers = (self._model.ctypes.data, self._table.ctypes.data)

    @property
    def positions(self) -> int:
        """L: tokens may lie at positions below it."""
        return int(self._model[-1])

    def turn(self, cosine: Tensor, sine: Tensor) -> None:
        """Set the angles of positions 0..L: [L, Dh] each, both halves of a head."""
        shape = (len(cosine), self._size)
        self._angles = (cosine.contiguous(), sine.contiguous())
        for name, table in zip(("cosine", "sine"), self._angles, strict=True):
            expect(OP, name, table, "L Dh", (self.dtype,))
            if table.shape != shape or not table.is_cpu:
                raise ValueError(f"{OP}: {name} is {list(table.shape)} on {table.device}, expected {list(shape)}")
        self._model[-3:] = (*(t.data_ptr() for t in self._angles), shape[0])

    def __call__(self, tokens: np.ndarray) -> Tensor:
        """Hidden states [R, D] after the last norm; K and V of each token go to the pool row behind its sequence.

        tokens: [R, 5] int64, contiguous: id, first own row, own rows written so far, (start, length) of the prefix.
        Raises ValueError for a token outside the vocabulary, the pool or the table of angles; nothing is done then.
        """
        if tokens.dtype != np.int64 or tokens.ndim != 2 or tokens.shape[1] != 5 or not tokens.flags.c_contiguous:
            raise ValueError(f"{OP}: tokens must be contiguous int64 [R, 5], got {tokens.dtype} {tokens.shape}")
        out = torch.empty(len(tokens), self.width, dtype=self.dtype)
        bad = self._run(*self._pointers, tokens.ctypes.data, out.data_ptr(), len(tokens), *self._fixed)
        if bad >= 0:
            name, start, length, shared, prefix = tokens[bad].tolist()
            raise ValueError(
                f"{OP}: token {bad}: id {name} of {self._model[9]}, row {start} + {length} and prefix {shared} + "
                f"{prefix} of {self._rows}, position {length + prefix} of {self.positions}"
            )
        return out

    def _layer(self, layer: StepLayer) -> list[int]:
        pool = (self._rows, self._kv_heads, self._size)
        for name, tensor in (("k", layer.k), ("v", layer.v)):
            if tensor.shape != pool or tensor.dtype != self.dtype or not tensor.is_contiguous():
                raise ValueError(f"{OP}: {name} is {tensor.dtype} {list(tensor.shape)}, expected {list(pool)}")
        width, size, inner = self.width, self._size, self._inner
        every = (self._heads + 2 * self._kv_heads) * size
        products = (
            ("qkv", layer.qkv, every, width),
            ("o", layer.o, width, self._heads * size),
            ("gate_up", layer.gate_up, 2 * inner, width),
            ("down", layer.down, width, inner),
        )
        norms = (layer.input_norm, width), (layer.post_norm, width), (layer.q_norm, size), (layer.k_norm, size)
        return [
            *(0 if tensor is None else self._vector("norm", tensor, columns) for tensor, columns in norms),
            *(self._keep(layer.k), self._keep(layer.v), layer.window),
            *(number for product in products for number in self._product(*product)),
        ]

    def _product(self, name: str, product: Product, outputs: int, columns: int) -> list[int]:
        weight, bias = product
        shift = 0 if bias is None else self._vector(f"{name}.bias", bias, outputs)
        if not isinstance(weight, NF4):
            values, scale = weight if isinstance(weight, Int8) else (weight, None)
            return [*self._matrix(name, values, scale, outputs, columns), shift, 0, outputs, columns]
        if tuple(weight.shape) != (outputs, columns) or columns % 2:
            raise ValueError(f"{OP}: {name} is {list(weight.shape)}, expected [{outputs}, {columns}], columns even")
        packed, absmax = weight.packed, weight.absmax
        if not packed.is_contiguous() or not absmax.is_contiguous() or absmax.dtype != torch.float32:
            raise ValueError(f"{OP}: {name} has gaps or scales that are not float32")
        return [self._keep(packed), self._keep(absmax), shift, weight.blocksize, outputs, columns]

    def _matrix(self, name: str, values: Tensor, scale: Tensor | None, outputs: int, columns: int) -> tuple[int, int]:
        expect(OP, name, values, "O K", (self.dtype if scale is None else torch.int8,))
        if values.shape != (outputs, columns) or not values.is_contiguous():
            raise ValueError(f"{OP}: {name} is {list(values.shape)}, expected [{outputs}, {columns}] without gaps")
        if scale is None:
            return self._keep(values), 0
        return self._keep(values), self._vector(f"{name}.scale", scale, outputs, torch.float32)

    def _vector(self, name: str, tensor: Tensor, size: int | None = None, dtype: torch.dtype | None = None) -> int:
        expect(OP, name, tensor, "O", (dtype or self.dtype,))
        if len(tensor) != (self.width if size is None else size) or not tensor.is_contiguous():
            raise ValueError(f"{OP}: {name} has {len(tensor)} entries, expected {size or self.width} without gaps")
        return self._keep(tensor)

    def _keep(self, tensor: Tensor) -> int:
        if not tensor.is_cpu:
            raise ValueError(f"{OP}: a tensor is on {tensor.device}")
        # an alias of the memory, which a Parameter whose data is replaced would let go
        self._held.append(tensor.detach())
        return tensor.data_ptr()


def _shape(weight: Weight) -> tuple[int, int]:
    shape = weight.values.shape if isinstance(weight, Int8) else weight.shape
    return shape[0], shape[1]
