"""packed_attention, against what torch offers for the same pack: its peers are in ``_attention_peers.py``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tinyllava_fast.bench.case import SUITE, Candidate, Case, Pack, Setting, gpu_peer, nbytes, pack_of, works
from tinyllava_fast.bench.suite._attention_peers import BLOCK_MASK, PADDED, PER_SEGMENT, Peers
from tinyllava_fast.ops import packed_attention

HEADLINE = {
    "packed_attention_vs_sdpa_per_segment": PER_SEGMENT,
    "packed_attention_vs_block_mask": BLOCK_MASK,
}


@SUITE.register("packed_attention")
def cases(setting: Setting) -> Iterator[Case]:
    """The pack with every peer; then other head sizes, segment and pack lengths with the fastest of them."""
    yield _case(setting, pack_of(setting), main=True)
    if setting.quick:
        return
    for head_dim in (80, 96, 128, 256):
        yield _case(setting, Pack(head_dim=head_dim))
    for sample in (16, 64, 1024, 4096):
        yield _case(setting, Pack(sample=sample))
    if setting.sweep:
        for tokens in (1024, 2048, 8192):
            yield _case(setting, Pack(tokens=tokens))


def _case(setting: Setting, pack: Pack, *, main: bool = False) -> Case:
    q = setting.randn(pack.tokens, pack.heads, pack.head_dim)
    k, v = (setting.randn(pack.tokens, pack.kv_heads, pack.head_dim) for _ in range(2))
    peers = Peers(q, k, v, pack.bounds)
    run: dict[str, Candidate] = {PER_SEGMENT: peers.per_segment, PADDED: peers.padded()}
    if main:
        run[BLOCK_MASK] = peers.block_mask()
        run |= setting.compiled(f"{PER_SEGMENT}, compiled", peers.per_segment)
        if setting.compile:
            run["flex_attention, block mask, compiled"] = peers.flex()
        run["nested tensors, jagged"] = peers.nested()
        run["flash-attn"] = gpu_peer("flash_attn", setting.device) or peers.flash_attn()
    cu = torch.tensor(pack.bounds, dtype=torch.int32, device=setting.device)
    run["ours"] = lambda: packed_attention(q, k, v, cu)[0]
    lengths = pack.lengths
    label = f"T={pack.tokens} S={len(lengths)}x{pack.sample} H={pack.heads}/{pack.kv_heads} Dh={pack.head_dim}"
    triangle = sum(n * (n + 1) // 2 for n in lengths)
    work = works(4.0 * triangle * pack.heads * pack.head_dim, nbytes(q, k, v), nbytes(q), nbytes(q, k, v))
    axes: dict[str, float] = {}
    if pack.head_dim == Pack.head_dim:
        if pack.tokens == Pack.tokens:
            axes["tokens a segment, in a pack of 4,096"] = pack.sample
        if pack.sample == Pack.sample:
            axes["tokens of the pack, in segments of 374"] = pack.tokens
    headline = HEADLINE if main else {}
    return Case("packed_attention", label, run, work, (q, k, v), (cu,), headline, axes=axes, main=main)
