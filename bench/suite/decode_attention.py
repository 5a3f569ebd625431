"""decode_attention: the newest token of each sequence against its keys, an image and a question long."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from tinyllava_fast.bench.case import FORWARD, SUITE, Case, Setting, Work, nbytes, pack_of
from tinyllava_fast.ops import decode_attention

QUESTION = 44


@SUITE.register("decode_attention")
def cases(setting: Setting) -> Iterator[Case]:
    """One sequence, and as many as answer together."""
    for count in (3,) if setting.quick else (1, 32):
        yield _case(setting, count)


def _case(setting: Setting, count: int) -> Case:
    pack = pack_of(setting)
    rows = pack.image_tokens + QUESTION
    q = setting.randn(count, pack.heads, pack.head_dim, grad=False)
    k, v = (setting.randn(count * rows, pack.kv_heads, pack.head_dim, grad=False) for _ in range(2))
    start = torch.arange(0, count * rows, rows, dtype=torch.int32).to(q.device)
    used = torch.full_like(start, rows)

    def sdpa() -> Tensor:
        keys, values = (x.view(count, rows, *x.shape[1:]).transpose(1, 2) for x in (k, v))
        return functional.scaled_dot_product_attention(q.unsqueeze(2), keys, values, enable_gqa=True).squeeze(2)

    run = {"torch": sdpa, **setting.compiled("torch compiled", sdpa)}
    run["ours"] = lambda: decode_attention(q, k, v, start, used)
    work = {FORWARD: Work(4.0 * count * rows * pack.heads * pack.head_dim, nbytes(q, k, v))}
    return Case("decode_attention", f"S={count} keys={rows} H={pack.heads} Hkv={pack.kv_heads}", run, work)
