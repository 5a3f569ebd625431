"""decode_attention: one new token of a sequence over its rows of the K/V pool."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from tinyllava_fast.bench.case import FORWARD, SUITE, Case, Run, Setting, Work, nbytes, pack_of
from tinyllava_fast.ops import decode_attention

LEAD = 3  # rows of the pool before the sequence's own


@SUITE.register("decode_attention")
def cases(setting: Setting) -> Iterator[Case]:
    """One sequence whose keys are an image and a question."""
    pack = pack_of(setting)
    rows = pack.image_tokens + 44
    q = setting.randn(1, pack.heads, pack.head_dim, grad=False)
    k, v = (setting.randn(rows + LEAD, pack.kv_heads, pack.head_dim, grad=False) for _ in range(2))
    start, used = (torch.tensor([n], dtype=torch.int32, device=setting.device) for n in (LEAD, rows))

    def sdpa() -> Tensor:
        keys, values = (x[LEAD:].transpose(0, 1)[None] for x in (k, v))
        out = functional.scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, enable_gqa=True)
        return out[0].transpose(0, 1)

    run: dict[str, Run] = {
        "torch SDPA": sdpa,
        **setting.compiled("torch SDPA compiled", sdpa),
        "ours": lambda: decode_attention(q, k, v, start, used),
    }
    work = {FORWARD: Work(4.0 * rows * pack.heads * pack.head_dim, nbytes(q, q, k, v))}
    label = f"keys={rows} H={pack.heads} Hkv={pack.kv_heads} Dh={pack.head_dim}"
    yield Case("decode_attention", label, run, work)
