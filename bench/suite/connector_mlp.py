"""connector_mlp: the connector between tower and language model, on the rows of a frozen tower."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional

from tinyllava_fast.bench.case import SUITE, Case, Run, Setting, nbytes, works
from tinyllava_fast.ops import connector_mlp

SHAPES = ((1568, 768, 576), (1458, 1152, 2048))
"""Rows, inputs and width: SigLIP-B to SmolLM2-135M, eight images; SigLIP-so400m to TinyLlama, two."""


@SUITE.register("connector_mlp")
def cases(setting: Setting) -> Iterator[Case]:
    """mlp2x_gelu at two sizes."""
    for rows, inputs, width in ((5, 32, 16),) if setting.quick else SHAPES:
        x = setting.randn(rows, inputs, grad=False)
        w1, b1 = setting.randn(width, inputs), setting.randn(width)
        w2, b2 = setting.randn(width, width), setting.randn(width)
        yield _case(setting, x, w1, b1, w2, b2)


def _case(setting: Setting, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Case:
    def plain() -> Tensor:
        return functional.linear(functional.gelu(functional.linear(x, w1, b1)), w2, b2)

    run: dict[str, Run] = {
        "torch": plain,
        **setting.compiled("torch compiled", plain),
        "ours": lambda: connector_mlp(x, w1, b1, w2, b2),
    }
    rows, (width, inputs) = len(x), w1.shape
    leaves = (w1, b1, w2, b2)
    first, second = 2.0 * rows * width * inputs, 2.0 * rows * width * width
    # x is a frozen tower's, so that the first layer has no gradient of its input.
    backward = (first + 2 * second) / (first + second)
    written = rows * width * x.element_size()
    work = works(first + second, nbytes(x, *leaves), written, nbytes(*leaves), backward=backward)
    return Case("connector_mlp", f"N={rows} K={inputs} D={width}", run, work, leaves, (x,))
