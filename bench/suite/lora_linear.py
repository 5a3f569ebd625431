"""lora_linear: a frozen projection with its adapter, against peft's layer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional

from tinyllava_fast.bench.case import SUITE, Candidate, Case, Run, Setting, lacking, nbytes, pack_of, works
from tinyllava_fast.ops import lora_linear

RANKS, DROPOUT = (128, 16), 0.05


@SUITE.register("lora_linear")
def cases(setting: Setting) -> Iterator[Case]:
    """The first projection of SmolLM2-135M's MLP over a pack, without and with dropout."""
    for rank in RANKS:
        yield _case(setting, rank, 0.0)
        yield _case(setting, rank, DROPOUT)


def _case(setting: Setting, rank: int, p: float) -> Case:
    pack = pack_of(setting)
    rows, width, outputs = pack.tokens, pack.width, pack.width * 8 // 3
    x, w = setting.randn(rows, width), setting.randn(outputs, width, grad=False)
    a, b = setting.randn(rank, width), setting.randn(outputs, rank)
    seed = setting.randint(1 << 62)

    def plain() -> Tensor:
        dropped = functional.dropout(x, p) if p else x
        return functional.linear(x, w) + functional.linear(functional.linear(dropped, a), b) * 2.0

    run: dict[str, Candidate] = {"torch": plain, **setting.compiled("torch compiled", plain)}
    run["peft"] = lacking("peft") or _peft(x, w, a, b, p)
    run["ours"] = lambda: lora_linear(x, w, None, a, b, 2.0, p, seed)
    base, adapter = 2.0 * rows * width * outputs, 2.0 * rows * rank * (width + outputs)
    written = rows * outputs * x.element_size()
    backward = (base + 2 * adapter) / (base + adapter)  # W is frozen: only its share of dx
    work = works(base + adapter, nbytes(x, w, a, b), written, nbytes(x, a, b), backward=backward)
    headline = {} if p or rank != RANKS[0] else {"lora_linear_vs_peft": "peft"}
    label = f"N={rows} K={width} O={outputs} R={rank} p={p}"
    return Case("lora_linear", label, run, work, (x, a, b), (w,), headline, masks=p > 0)


def _peft(x: Tensor, w: Tensor, a: Tensor, b: Tensor, p: float) -> Run:
    from peft.tuners.lora import Linear, LoraConfig

    base = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(w, requires_grad=False)
    rank = len(a)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=p)
    layer = Linear(base, "default", config, r=rank, lora_alpha=2 * rank)
    for module, tensor in ((layer.lora_A["default"], a), (layer.lora_B["default"], b)):
        del module.weight
        module.weight = tensor  # the very leaf that the others use
    return lambda: layer(x)
