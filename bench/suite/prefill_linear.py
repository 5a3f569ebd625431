"""prefill_linear: the linear layers of a prompt or an image, over as many weights as no cache holds."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional

from tinyllava_fast.bench.case import FORWARD, SUITE, Case, Run, Setting, Work, nbytes, pack_of
from tinyllava_fast.log import log
from tinyllava_fast.ops import quantize_int8
from tinyllava_fast.ops._policy import faster
from tinyllava_fast.ops.decode_linear import in_huge_pages
from tinyllava_fast.ops.linear import dense_weight
from tinyllava_fast.ops.prefill_linear import prefill_linear

LAYERS = 16


@SUITE.register("prefill_linear")
def cases(setting: Setting) -> Iterator[Case]:
    """Gate and up of SmolLM2-135M's MLP as one product, for a few rows, a prompt and several; weights also in int8."""
    if not setting.quick and not faster("prefill_linear", setting.randn(1, 1, grad=False)):
        log.info("prefill_linear: left out, it runs only in AMX tiles; elsewhere the layers are torch's")
        return
    for rows in (20,) if setting.quick else (64, 240, 1024):
        yield _case(setting, rows, int8=False)
    yield _case(setting, 20 if setting.quick else 240, int8=True)


def _case(setting: Setting, rows: int, *, int8: bool) -> Case:
    count, width = (2 if setting.quick else LAYERS), pack_of(setting).width
    outputs = width * 16 // 3 // 2 * 2
    x = setting.randn(rows, width, grad=False)
    weights = [setting.randn(outputs, width, grad=False) for _ in range(count)]
    held = [(in_huge_pages(w), None) for w in weights]
    peers = weights
    if int8:
        quantized = [quantize_int8(w) for w in weights]
        held = [(in_huge_pages(q.values), q.scale) for q in quantized]  # type: ignore[misc]
        peers = [dense_weight(q, x.dtype) for q in quantized]

    def plain() -> Tensor:
        return [functional.linear(x, w) for w in peers][-1]

    def ours() -> Tensor:
        return [prefill_linear.infer(x, w, scale, None, "none", None) for w, scale in held][-1]

    run: dict[str, Run] = {"torch": plain, "ours": ours}
    size = sum(nbytes(w) + (0 if scale is None else nbytes(scale)) for w, scale in held)
    work = {FORWARD: Work(2.0 * rows * width * outputs * count, size + nbytes(x) * (1 + count * outputs / width))}
    label = f"N={rows} K={width} O={outputs}{' int8' if int8 else ''}, {count} layers"
    return Case("prefill_linear", label, run, work)
