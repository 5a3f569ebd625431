"""Attention of packed sequences inside transformers' own modules.

transformers calls whatever function is registered under ``config._attn_implementation`` and builds no mask for a name
it does not know. We register two:

    tlf_packed   decoders: causal attention inside the segments of one packed row (training), or of new tokens
                 against a pool of cached keys and values (inference)
    tlf_full     vision towers: every token of an image sees every token of that image

Legend: B batch, T tokens, H heads, Hkv key/value heads, Dh head size, S segments, P rows of the KV pool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

from tinyllava_fast.ops._op import is_inlined
from tinyllava_fast.ops._policy import faster
from tinyllava_fast.ops.decode_attention import decode_attention
from tinyllava_fast.ops.packed_attention import packed_attention

PACKED = "tlf_packed"
FULL = "tlf_full"


@dataclass
class KVView:
    """The rows of a preallocated pool that hold the keys and values of one inference call, and those each query sees.

    The call's own K and V rows are written to ``slots`` first, so a sequence's new tokens see one another.
    """

    k: list[Tensor]  # per layer [P, Hkv, Dh]
    v: list[Tensor]  # per layer [P, Hkv, Dh]
    slots: Tensor  # [T] int64: pool row of each token of this call
    cu_seqlens_q: Tensor  # [S + 1] int32: this call's tokens of each sequence
    cu_seqlens_k: Tensor  # [S + 1] int32: first pool row of each sequence
    seqused_k: Tensor  # [S] int32: keys of each sequence, this call's included
    prefix: Tensor | None = None  # [S, 2] int32: (start, length) of pool rows shared by all queries of the sequence
    single: bool = False  # every sequence has exactly one token in this call


@dataclass(frozen=True)
class Watched:
    """The queries and keys of one layer as its attention saw them, of one segment without a prefix."""

    layer: int
    q: Tensor  # [T, H, Dh]
    k: Tensor  # [T, Hkv, Dh]
    scale: float | None
    window: int  # 0: none
    softcap: float  # 0: none


@dataclass
class CachedKV:
    """Keys and values of earlier tokens as plain tensors, in graphs that other engines run (models/graphs.py)."""

    past: list[tuple[Tensor, Tensor]]  # a layer: K and V [B, Hkv, P, Dh]
    mask: Tensor  # [B, P + T]: 0 where a position is padding
    present: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # filled by the layers: [B, Hkv, P + T, Dh]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Return causal attention [B, T, H, Dh] of query [B, H, T, Dh] over the past and this call's K and V."""
        key, value = (torch.cat(pair, dim=2) for pair in zip(self.past[layer], (key, value), strict=True))
        self.present.append((key, value))
        groups = int(query.shape[1]) // int(key.shape[1])
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        bias = self._bias(query, window)
        if not softcap:
            out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)
            return out.transpose(1, 2)
        scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
        weights = torch.softmax(softcap * torch.tanh(scores / softcap) + bias, dim=-1)
        return (weights @ value).transpose(1, 2)

    def _bias(self, query: Tensor, window: int | None) -> Tensor:
        """Return what is added to the scores, [B, 1, T, P + T]: zero, or the least number where a key is hidden."""
        keys, queries = self.mask.shape[1], query.shape[2]
        column = torch.arange(keys, device=query.device)[None]
        row = (torch.arange(queries, device=query.device) + keys - queries)[:, None]
        seen = column <= row
        if window:
            seen = seen & (column > row - window)
        seen = seen[None, None] & self.mask[:, None, None].bool()
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        return torch.where(seen, zero, torch.finfo(query.dtype).min)


def packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    prefix: Tensor | None = None,
    kv: KVView | None = None,
    cached: CachedKV | None = None,
    s_aux: Tensor | None = None,
    watch: Callable[[Watched], None] | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention function of decoders. watch: is shown the queries and keys of each layer.

    query [1, H, T, Dh], key and value [1, Hkv, T, Dh]; give ``cu_seqlens`` [S + 1] (and ``prefix`` [S, 2]) in
    training, ``kv`` in inference. Returns ([1, T, H, Dh], None). With ``cached``, there may be more rows than one.
    Raises ValueError where neither arrives, or for a feature that packed attention lacks.
    """
    owner = type(module).__name__
    if cached is not None:
        _refuse(owner, query[:1], attention_mask, dropout, s_aux)  # here there may be more rows than one
        layer: int = module.layer_idx  # type: ignore[assignment]
        return cached.attend(layer, query, key, value, scaling, sliding_window, softcap), None
    _refuse(owner, query, attention_mask, dropout, s_aux)
    # squeeze, because the gradient of x[0] is a copy into zeros
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, H | Hkv, Dh]
    causal = bool(getattr(module, "is_causal", True))
    if kv is not None:
        pool_k, pool_v = kv.k[module.layer_idx], kv.v[module.layer_idx]  # type: ignore[index]
        pool_k.index_copy_(0, kv.slots, k)
        pool_v.index_copy_(0, kv.slots, v)
        k, v, cu_q, cu_k, used, prefix = pool_k, pool_v, kv.cu_seqlens_q, kv.cu_seqlens_k, kv.seqused_k, kv.prefix
    elif cu_seqlens is not None:
        cu_q, cu_k, used = cu_seqlens, None, None
    else:
        raise ValueError(
            f"tlf_packed: {owner} passed neither cu_seqlens nor kv on to its attention function. Call the model "
            "through LMM.decode; if that is what you do, this architecture drops attention keyword arguments and "
            "needs a family of its own: set model.llm.type to it, or add one to models/llm"
        )
    window = sliding_window if sliding_window and sliding_window < k.shape[0] else 0  # a longer one hides nothing
    if window and prefix is not None:
        raise ValueError(
            f"tlf_packed: {owner} sees only the last {window} tokens, and this call has {k.shape[0]} with shared "
            f"prefixes, which windows do not cover; set data.turns=conversation, or batch.tokens to at most {window}"
        )
    if watch is not None:
        watch(Watched(int(module.layer_idx), q, k, scaling, window, softcap or 0.0))  # type: ignore[arg-type]
    if kv is not None and kv.single:
        start, seen = kv.cu_seqlens_k[:-1], kv.seqused_k
        if window:  # the newest token sees the last rows of its sequence
            start, seen = start + (seen - window).clamp(min=0), seen.clamp(max=window)
        out = decode_attention(q, k, v, start, seen, scale=scaling, prefix=prefix, softcap=softcap or 0.0)
        return out.unsqueeze(0), None
    out, _lse = packed_attention(
        q,
        k,
        v,
        cu_q,
        cu_k,
        causal=causal,
        scale=scaling,
        prefix=prefix,
        seqused_k=used,
        window=window,
        softcap=softcap or 0.0,
    )
    return out.unsqueeze(0), None


def full(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention function of vision towers: query, key, value [N, H, K, Dh] -> ([N, K, H, Dh], None), no mask."""
    if dropout or attention_mask is not None:
        raise ValueError(f"tlf_full: {type(module).__name__} asks for attention dropout or a mask; it has neither")
    if is_inlined() or not faster("packed_attention of images", query):
        out = nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling)
        return out.transpose(1, 2), None
    images, heads, tokens, size = query.shape
    q, k, v = (x.transpose(1, 2).reshape(images * tokens, heads, size) for x in (query, key, value))
    bounds = torch.arange(0, (images + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
    out, _lse = packed_attention(q, k, v, bounds, causal=False, scale=scaling)
    return out.view(images, tokens, heads, size), None


def _refuse(owner: str, query: Tensor, mask: Tensor | None, dropout: float, s_aux: Tensor | None) -> None:
    """Never ignore what changes the result: say by name what packed attention does not do."""
    if query.shape[0] != 1:
        raise ValueError(f"tlf_packed: {owner} got a batch of {query.shape[0]}; packed sequences are one row")
    if mask is not None:
        raise ValueError(f"tlf_packed: {owner} got an attention mask; segments are given by cu_seqlens")
    if dropout:
        raise ValueError(f"tlf_packed: {owner} asks for attention dropout {dropout}; set attention_dropout: 0")
    if s_aux is not None:
        raise ValueError(f"tlf_packed: {owner} uses attention sinks, which packed_attention lacks")


AttentionInterface.register(PACKED, packed)
AttentionInterface.register(FULL, full)
