"""Linear layers whose weight is kept in 4 bits: NF4 (QLoRA, arXiv 2305.14314) in bitsandbytes' layout.

    W.flat[i] = CODEBOOK[nibble i] * absmax[i // blocksize]        one float32 product, then rounded to the dtype
    y         = x Wᵀ + bias                                        dx = dy W
    nibble i  = the high half of packed[i // 2] for even i, the low half for odd i

Blocks run over the flattened weight, so a row may start in the middle of one. A few rows of x (_policy.TABLE) read
the packed weight; more multiply with the dequantized one, in a buffer of at most TILE_BYTES that a thread keeps.
Legend: N rows of x, K inputs, O outputs, P packed bytes, S blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._check import FLOATS, expect
from tinyllava_fast.ops._op import Context, Sample, define_op
from tinyllava_fast.ops._policy import faster

CODEBOOK = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Values of the 16 codes (appendix E of the paper)."""
TILE_BYTES = 32 << 20
"""Most bytes of a weight that are dequantized at once: one product is faster than several narrow ones."""


class NF4(NamedTuple):
    """A weight [O, K] in four bits; ``dequantize_nf4(*nf4)`` and ``linear_nf4(x, *nf4)`` take it apart."""

    packed: Tensor  # [ceil(O K / 2)] uint8
    absmax: Tensor  # [ceil(O K / blocksize)] float32
    shape: tuple[int, int]
    blocksize: int = 64


class QuantState(Protocol):
    """The parts of bitsandbytes' QuantState that are read here. state2: of the scales, if they are quantized."""

    quant_type: str
    shape: Sequence[int]
    absmax: Tensor
    blocksize: int
    code: Tensor
    offset: Tensor
    state2: QuantState | None


def unpack_nf4(packed: Tensor, quant_state: QuantState) -> NF4:
    """Return the plain tensors of a weight quantized by bitsandbytes.

    packed: what ``quantize_4bit`` returns, of any storage dtype (not copied). quant_state: its QuantState of type nf4;
    scales that are themselves quantized (``compress_statistics``) are restored to float32, bit for bit as bitsandbytes
    does it. Raises ValueError for another type, a weight that is no matrix, or blocks of scales of no power of two.
    """
    if quant_state.quant_type != "nf4":
        raise ValueError(f"nf4: the weight is of type {quant_state.quant_type!r}, expected 'nf4'")
    if len(quant_state.shape) != 2:
        raise ValueError(f"nf4: the weight must be [O, K], got shape {list(quant_state.shape)}")
    absmax = quant_state.absmax
    nested = quant_state.state2
    if nested is not None:
        absmax = absmax.flatten()
        # A shift: where a number of scales that nested.blocksize does not divide is divided by it, or repeated and cut,
        # Inductor 2.13 leaves those of the last block unwritten.
        shift = nested.blocksize.bit_length() - 1
        if nested.blocksize != 1 << shift:
            raise ValueError(f"nf4: scales quantized in blocks of {nested.blocksize}, expected a power of two")
        scale = nested.absmax[torch.arange(len(absmax), device=absmax.device) >> shift]
        absmax = nested.code[absmax.long()] * scale + quant_state.offset
    shape = (int(quant_state.shape[0]), int(quant_state.shape[1]))
    return NF4(packed.flatten().view(torch.uint8), absmax.float(), shape, quant_state.blocksize)


def quantize_nf4(weight: Tensor, blocksize: int = 64) -> NF4:
    """Return a weight [O, K], any float, in four bits: blocks scaled by their largest magnitude, to the nearest code.

    The same codes and scales as bitsandbytes'. Raises ValueError for a weight that is no matrix or an odd blocksize.
    """
    expect("nf4", "weight", weight, "O K", FLOATS)
    if blocksize < 2 or blocksize % 2:
        raise ValueError(f"nf4: blocksize must be even and positive, got {blocksize}")
    flat = weight.detach().float().flatten()
    blocks = functional.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(1) if len(blocks) else blocks.new_empty(0)
    codes = torch.tensor(CODEBOOK, device=flat.device)
    scaled = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    nibbles = torch.bucketize(scaled, (codes[1:] + codes[:-1]) / 2, out_int32=True).to(torch.uint8)
    pairs = nibbles.flatten()[: flat.numel() + flat.numel() % 2].view(-1, 2)
    return NF4(pairs[:, 0] << 4 | pairs[:, 1], absmax, (weight.shape[0], weight.shape[1]), blocksize)


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    blocksize: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return the whole weight [O, K], equal to bitsandbytes' to the bit, for any K.

    packed: [ceil(O K / 2)] uint8. absmax: [ceil(O K / blocksize)] float32. shape: (O, K). blocksize: even. dtype: of
    the result, any float. Not differentiable. Raises ValueError for shapes and dtypes.
    """
    return _dequantize_nf4.op(packed, absmax, *shape, blocksize, dtype)


def linear_nf4(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    blocksize: int = 64,
    bias: Tensor | None = None,
) -> Tensor:
    """Return x Wᵀ + bias with W dequantized tile by tile.

    x: [..., K] float. packed, absmax, shape, blocksize: see dequantize_nf4(). bias: [O], x's dtype. Returns [..., O] of
    x's dtype. Differentiable in x and bias; W is frozen. Raises ValueError for shapes and dtypes.
    """
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return linear_nf4_fwd.call(flat, packed, absmax, *shape, blocksize, bias).view(*x.shape[:-1], shape[0])


def _stored(packed: Tensor, absmax: Tensor, rows: int, columns: int, blocksize: int) -> NF4:
    """Return the weight of an op, whose arguments are its parts."""
    return NF4(packed, absmax, (rows, columns), blocksize)


def check_nf4(op: str, weight: NF4) -> None:
    """Raise ValueError unless the tensors hold a weight of the shape."""
    packed, absmax, (rows, columns), blocksize = weight
    expect(op, "packed", packed, "P", (torch.uint8,))
    expect(op, "absmax", absmax, "S", (torch.float32,), like=packed)
    if blocksize < 2 or blocksize % 2:
        raise ValueError(f"{op}: blocksize must be even and positive, got {blocksize}")
    size = rows * columns
    if packed.shape[0] != (size + 1) // 2:
        raise ValueError(f"{op}: {packed.shape[0]} packed bytes for a weight [{rows}, {columns}]: {(size + 1) // 2}")
    blocks = (size + blocksize - 1) // blocksize
    if absmax.shape[0] != blocks:
        raise ValueError(f"{op}: {absmax.shape[0]} scales for {blocks} blocks of {blocksize} weights")


def dense(weight: NF4, dtype: torch.dtype) -> Tensor:
    """Return the whole weight in plain torch: every reference multiplies by it."""
    size = math.prod(weight.shape)
    nibbles = torch.stack([weight.packed >> 4, weight.packed & 15], 1).flatten()[:size].long()
    codes = torch.tensor(CODEBOOK, dtype=torch.float32, device=weight.packed.device)
    return (codes[nibbles] * weight.absmax.repeat_interleave(weight.blocksize)[:size]).view(weight.shape).to(dtype)


def _fill_tile(out: Tensor, weight: NF4, row: int) -> None:
    """Dequantize W[row : row + h] into out [h, K] in C++; packed and absmax contiguous."""
    _cpp.extension().nf4_tile(
        *(weight.packed.data_ptr(), weight.absmax.data_ptr(), weight.blocksize, weight.shape[1], row, 0),
        *(out.data_ptr(), out.stride(0), out.shape[0], out.shape[1], _cpp.DTYPE_CODES[out.dtype]),
    )


def _contiguous(weight: NF4) -> NF4:
    return weight._replace(packed=weight.packed.contiguous(), absmax=weight.absmax.contiguous())


def multiply(x: Tensor, weight: NF4, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + bias in C++ and torch's GEMM; x [N, K] float32 or bfloat16."""
    packed, absmax, (rows, columns), blocksize = weight = _contiguous(weight)
    y = _cpp.empty(len(x), rows, dtype=x.dtype)
    if faster("linear_nf4", x, rows=len(x), columns=columns, blocksize=blocksize):
        x = _cpp.unit_stride(x)
        bias = None if bias is None else bias.contiguous()
        scratch = _cpp.row_scratch(columns)
        _cpp.extension().nf4_linear_few(
            *(x.data_ptr(), x.stride(0), packed.data_ptr(), absmax.data_ptr(), blocksize),
            *(0 if bias is None else bias.data_ptr(), scratch.data_ptr(), y.data_ptr()),
            *(len(x), rows, columns, _cpp.DTYPE_CODES[x.dtype]),
        )
        return y
    for start, stop, w in _tiles(weight, x.dtype):
        part = slice(start, stop)
        if bias is None:
            torch.mm(x, w.t(), out=y[:, part])
        else:
            torch.addmm(bias[part], x, w.t(), out=y[:, part])
    return y


def multiply_transposed(grad: Tensor, weight: NF4, into: Tensor | None = None) -> Tensor:
    """Return grad W in C++ and torch's GEMM; grad [N, O] float32 or bfloat16. into: [N, K] to add to, and return."""
    dx = _cpp.empty(len(grad), weight.shape[1], dtype=grad.dtype) if into is None else into
    if weight.shape[0] == 0:
        return dx.zero_() if into is None else dx
    for start, stop, w in _tiles(_contiguous(weight), grad.dtype):
        if start == 0 and into is None:
            torch.mm(grad[:, :stop], w, out=dx)
        else:  # a weight beyond TILE_BYTES: partial sums are rounded in between
            dx.addmm_(grad[:, start:stop], w)
    return dx


def _tiles(weight: NF4, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, W[start:stop]) for all rows of W, each dequantized into this thread's buffer."""
    rows, columns = weight.shape
    height = max(1, min(rows, TILE_BYTES // max(1, columns * dtype.itemsize)))
    buffer = _cpp.scratch(height * columns * dtype.itemsize).view(dtype).view(height, columns)
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        w = buffer[: stop - start]
        _fill_tile(w, weight, start)
        yield start, stop, w


def _check_dequantize(weight: NF4, dtype: torch.dtype) -> None:
    check_nf4("nf4", weight)
    if dtype not in FLOATS:
        raise ValueError(f"nf4: dtype must be a float, got {dtype}")


def random_nf4(g: torch.Generator, rows: int, columns: int, blocksize: int) -> tuple[Tensor, Tensor, int, int, int]:
    """Return seeded arguments (packed, absmax, rows, columns, blocksize) for samples."""
    size = rows * columns
    packed = torch.randint(0, 256, ((size + 1) // 2,), generator=g, dtype=torch.uint8)
    return packed, torch.rand(-(-size // blocksize), generator=g) + 0.1, rows, columns, blocksize


SHAPES = (
    ("whole blocks", 20, 128, 64),
    ("rows start inside blocks", 9, 48, 64),
    ("wide, ragged", 5, 304, 64),
    ("odd width", 7, 37, 32),
    ("one weight", 1, 1, 64),
    ("large blocks", 6, 96, 256),
)


def _samples_dequantize() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)
    for label, rows, columns, blocksize in (*SHAPES, ("no row", 0, 8, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            args = (*random_nf4(g, rows, columns, blocksize), dtype)
            name = f"{label} {str(dtype).removeprefix('torch.')}"
            yield Sample(args, name, differentiable=False, kept=(1,))


def _cpp_dequantize(weight: NF4, dtype: torch.dtype) -> Tensor:
    out = _cpp.empty(*weight.shape, dtype=dtype)
    _fill_tile(out, _contiguous(weight), 0)
    return out


def _cpp_dequantize_takes(*args: object) -> str | None:
    known = (torch.float32, torch.bfloat16)
    return None if args[-1] in known else f"its C++ kernel makes {' or '.join(map(str, known))}, not {args[-1]}"


@define_op(
    module="nf4",
    name="dequantize_nf4",
    check=lambda *args: _check_dequantize(_stored(*args[:5]), args[5]),
    fake=lambda packed, absmax, rows, columns, blocksize, dtype: packed.new_empty((rows, columns), dtype=dtype),
    cpp=lambda *args: _cpp_dequantize(_stored(*args[:5]), args[5]),
    cpp_supports=_cpp_dequantize_takes,
    samples=_samples_dequantize,
)
def _dequantize_nf4(
    packed: Tensor, absmax: Tensor, rows: int, columns: int, blocksize: int, dtype: torch.dtype
) -> Tensor:
    return dense(_stored(packed, absmax, rows, columns, blocksize), dtype)


def _check(x: Tensor, weight: NF4, bias: Tensor | None) -> None:
    rows, columns = weight.shape
    expect("nf4", "x", x, "N K", FLOATS, like=weight.packed)
    check_nf4("nf4", weight)
    if x.shape[1] != columns:
        raise ValueError(f"nf4: x has {x.shape[1]} columns, the weight has {columns}")
    if bias is not None:
        expect("nf4", "bias", bias, "O", (x.dtype,), like=x)
        if bias.shape[0] != rows:
            raise ValueError(f"nf4: bias has {bias.shape[0]} entries, the weight has {rows} rows")


def _samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(1)
    for label, rows, columns, blocksize in SHAPES:
        for n in (1, 3, 21):
            x = torch.randn(columns, n, generator=g).t() if n == 3 else torch.randn(n, columns, generator=g)
            bias = torch.randn(rows, generator=g) if n != 1 else None
            args = (x, *random_nf4(g, rows, columns, blocksize), bias)
            yield Sample(args, f"{label}, {n} rows", kept=(2,))
    yield Sample((torch.randn(0, 64), *random_nf4(g, 4, 64, 64), None), "no row", kept=(2,))


@define_op(
    module="nf4",
    check=lambda x, *rest: _check(x, _stored(*rest[:5]), rest[5]),
    fake=lambda x, packed, absmax, rows, columns, blocksize, bias: x.new_empty((x.shape[0], rows)),
    cpp=lambda x, *rest: multiply(x, _stored(*rest[:5]), rest[5]),
    cpp_supports=_cpp.runs(torch.float32, torch.bfloat16),
    samples=_samples,
)
def linear_nf4_fwd(
    x: Tensor, packed: Tensor, absmax: Tensor, rows: int, columns: int, blocksize: int, bias: Tensor | None
) -> Tensor:
    """[N, O]; see linear_nf4()."""
    return functional.linear(x, dense(_stored(packed, absmax, rows, columns, blocksize), x.dtype), bias)


def _check_bwd(grad: Tensor, weight: NF4) -> None:
    expect("nf4", "grad", grad, "N O", FLOATS, like=weight.packed)
    check_nf4("nf4", weight)
    if grad.shape[1] != weight.shape[0]:
        raise ValueError(f"nf4: grad has {grad.shape[1]} columns, the weight has {weight.shape[0]} rows")


def _samples_bwd() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(2)
    for label, rows, columns, blocksize in SHAPES:
        args = (torch.randn(rows, 5, generator=g).t(), *random_nf4(g, rows, columns, blocksize))
        yield Sample(args, label, differentiable=False, kept=(2,))


@define_op(
    module="nf4",
    check=lambda grad, *parts: _check_bwd(grad, _stored(*parts)),
    fake=lambda grad, packed, absmax, rows, columns, blocksize: grad.new_empty((grad.shape[0], columns)),
    cpp=lambda grad, *parts: multiply_transposed(grad, _stored(*parts)),
    cpp_supports=_cpp.runs(torch.float32, torch.bfloat16),
    samples=_samples_bwd,
)
def linear_nf4_bwd(grad: Tensor, packed: Tensor, absmax: Tensor, rows: int, columns: int, blocksize: int) -> Tensor:
    """dx [N, K]."""
    return grad @ dense(_stored(packed, absmax, rows, columns, blocksize), grad.dtype)


def _setup_context(ctx: Context, inputs: tuple[object, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.settings = inputs[3:6]


def _backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    want_x, want_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[-1]
    dx = linear_nf4_bwd.op(grad, *ctx.saved_tensors, *ctx.settings) if want_x else None
    return dx, *(None,) * 5, grad.sum(0) if want_bias else None


linear_nf4_fwd.op.register_autograd(_backward, setup_context=_setup_context)
