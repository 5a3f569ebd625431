"""The connector, and the linear layers of LoRA and QLoRA next to peft's and bitsandbytes' where those are installed.

Shapes: the first projection of SmolLM2-135M's MLP (576 to 1536) over one pack, and over one token; rank 128.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tinyllava_fast.ops import NF4, connector_mlp, dequantize_nf4, linear_nf4, lora_linear
from tinyllava_fast.ops._op import force_backend
from tinyllava_fast.ops.nf4 import random_nf4

RANK, DROPOUT = 128, 0.05


@dataclass(frozen=True)
class Case:
    """One op on one shape: competitors that return the same tensor, and the leaves that receive gradients."""

    op: str
    label: str
    run: dict[str, Callable[[], Tensor]]
    leaves: tuple[Tensor, ...] = ()  # none: forward only
    flops: float = 0.0  # useful, of the forward pass; 0 where memory is what counts
    masks: bool = False  # each competitor draws its own dropout mask, so that results differ


def linear_cases(
    tokens: int, width: int, randn: Callable[..., Tensor], generator: torch.Generator, device: str
) -> Iterator[Case]:
    """connector_mlp over images, linear_nf4 over a pack and over one row, lora_linear without and with dropout."""
    width = max(width, 64)  # bitsandbytes is wrong on a CPU for less than a block
    outputs = width * 8 // 3
    yield _mlp(tokens // 2, width * 4 // 3, width, randn)
    yield _dequantize(width, outputs, generator, device)
    yield _nf4("linear_nf4", tokens, width, outputs, randn, generator, device)
    yield _nf4("linear_nf4, 1 row", 1, width, outputs, randn, generator, device)
    yield _lora("lora_linear", 0.0, tokens, width, outputs, randn, generator, device)
    yield _lora("lora_linear, dropout", DROPOUT, tokens, width, outputs, randn, generator, device)


def _mlp(rows: int, inputs: int, width: int, randn: Callable[..., Tensor]) -> Case:
    x = randn(rows, inputs, grad=False)  # of a frozen tower
    w1, b1, w2, b2 = randn(width, inputs), randn(width), randn(width, width), randn(width)

    def plain() -> Tensor:
        return functional.linear(functional.gelu(functional.linear(x, w1, b1)), w2, b2)

    run = {
        "torch": plain,
        "torch compiled": torch.compile(plain),
        "ours": lambda: connector_mlp(x, w1, b1, w2, b2),
    }
    flops = 2.0 * rows * width * (inputs + width)
    return Case("connector_mlp", f"N={rows} K={inputs} D={width}", run, (w1, b1, w2, b2), flops)


def _nf4(
    op: str,
    rows: int,
    width: int,
    outputs: int,
    randn: Callable[..., Tensor],
    generator: torch.Generator,
    device: str,
) -> Case:
    x = randn(rows, width)
    nf4 = _weight(outputs, width, generator, device)

    def plain() -> Tensor:
        return functional.linear(x, dequantize_nf4(*nf4, x.dtype))

    run: dict[str, Callable[[], Tensor]] = {"torch, W dequantised whole by ours": plain}
    if find_spec("bitsandbytes") is not None:
        run["bitsandbytes"] = _bitsandbytes(x, nf4)
    run["ours"] = lambda: linear_nf4(x, *nf4)
    flops = 2.0 * rows * width * outputs
    return Case(op, f"N={rows} K={width} O={outputs}", run, (x,) if rows > 1 else (), flops)


def _dequantize(width: int, outputs: int, generator: torch.Generator, device: str) -> Case:
    nf4 = _weight(outputs, width, generator, device)

    def reference() -> Tensor:
        with force_backend("reference"):
            return dequantize_nf4(*nf4)

    run: dict[str, Callable[[], Tensor]] = {"torch": reference}
    if find_spec("bitsandbytes") is not None:
        import_module("bitsandbytes")  # registers its ops
        op = torch.ops.bitsandbytes.dequantize_4bit.default
        run["bitsandbytes"] = lambda: op(nf4.packed, nf4.absmax, 64, "nf4", nf4.shape, torch.bfloat16)
    run["ours"] = lambda: dequantize_nf4(*nf4)
    return Case("dequantize_nf4", f"K={width} O={outputs}", run)


def _weight(outputs: int, width: int, generator: torch.Generator, device: str) -> NF4:
    packed, absmax, *_ = random_nf4(generator, outputs, width, 64)
    return NF4(packed.to(device), absmax.to(device), (outputs, width))


def _bitsandbytes(x: Tensor, nf4: NF4) -> Callable[[], Tensor]:
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import QuantState, get_4bit_type

    code = get_4bit_type("nf4", device=str(x.device))
    state = QuantState(nf4.absmax, torch.Size(nf4.shape), code, nf4.blocksize, "nf4", x.dtype)
    packed = nf4.packed[:, None]
    return lambda: matmul_4bit(x, packed.t(), state)


def _lora(
    op: str,
    p: float,
    rows: int,
    width: int,
    outputs: int,
    randn: Callable[..., Tensor],
    generator: torch.Generator,
    device: str,
) -> Case:
    x, w = randn(rows, width), randn(outputs, width, grad=False)
    a, b = randn(RANK, width), randn(outputs, RANK)
    seed = torch.randint(1 << 62, (), generator=generator).to(device)

    def plain() -> Tensor:
        dropped = functional.dropout(x, p) if p else x
        return functional.linear(x, w) + functional.linear(functional.linear(dropped, a), b) * 2.0

    run = {"torch": plain, "torch compiled": torch.compile(plain)}
    if find_spec("peft") is not None:
        run["peft"] = _peft(x, w, a, b, p)
    run["ours"] = lambda: lora_linear(x, w, None, a, b, 2.0, p, seed)
    flops = 2.0 * rows * (width * outputs + RANK * (width + outputs))
    return Case(op, f"N={rows} K={width} O={outputs} R={RANK} p={p}", run, (x, a, b), flops, masks=p > 0)


def _peft(x: Tensor, w: Tensor, a: Tensor, b: Tensor, p: float) -> Callable[[], Tensor]:
    from peft.tuners.lora import Linear, LoraConfig

    base = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(w, requires_grad=False)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=p)
    layer: Any = Linear(base, "default", config, r=RANK, lora_alpha=2 * RANK)
    for module, tensor in ((layer.lora_A["default"], a), (layer.lora_B["default"], b)):
        del module.weight
        module.weight = tensor  # the very leaf that the others use
    return lambda: layer(x)
