"""prefill_linear: the linear layers of a prompt or an image."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from tinyllava_fast.bench.case import SUITE, Case, Setting, pack_of
from tinyllava_fast.bench.suite._layers import layers_case
from tinyllava_fast.log import log
from tinyllava_fast.ops._policy import faster
from tinyllava_fast.ops.decode_linear import Int8
from tinyllava_fast.ops.prefill_linear import prefill_linear


@SUITE.register("prefill_linear")
def cases(setting: Setting) -> Iterator[Case]:
    """Gate and up of SmolLM2-135M's MLP as one product, for a few rows, a prompt and several; weights also in int8."""
    if not setting.quick and not faster("prefill_linear", setting.randn(1, 1, grad=False)):
        log.info("prefill_linear: left out, it runs only in AMX tiles; elsewhere the layers are torch's")
        return
    outputs = pack_of(setting).width * 16 // 3 // 2 * 2
    sizes = ((20, False), (20, True)) if setting.quick else ((64, False), (240, False), (1024, False), (240, True))
    for rows, int8 in sizes:
        yield layers_case("prefill_linear", setting, _layer, rows=rows, outputs=outputs, layers=16, int8=int8)


def _layer(x: Tensor, weight: Tensor | Int8) -> Tensor:
    values, scale = weight if isinstance(weight, Int8) else (weight, None)
    return prefill_linear.infer(x, values, scale, None, "none", None)
