"""The decoding step in one call, for models made of decoder_layer.py's layers; the others go layer by layer.

Legend: R sequences, D hidden width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyllava_fast.infer.fast_model.adapters import stock
from tinyllava_fast.infer.fast_model.cpp_step import DTYPES, Product, StepLayer, StepPlan
from tinyllava_fast.infer.fast_model.decoder_layer import DecodeLayer
from tinyllava_fast.infer.fast_model.linear import DecodeLinear
from tinyllava_fast.infer.fast_model.prepare import PreparedModel
from tinyllava_fast.infer.scheduling.pool import KVPool
from tinyllava_fast.log import log_once
from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._op import backend_wanted
from tinyllava_fast.ops._policy import most_rows

FIXED_ANGLES = ("default", "linear", "llama3", "yarn")  # the other kinds depend on the longest position so far


class FusedStep:
    """Calls cpp_step.StepPlan for a model and its pool; builds the plan when first asked, and anew when they change."""

    def __init__(self, model: PreparedModel, pool: KVPool, *, share_prefix: bool) -> None:
        self.lmm: Any = model.lmm
        self._ready = model.ready
        self.pool = pool
        self._share_prefix = share_prefix
        self._checked = False
        self._plan: StepPlan | None = None
        self._built_from: tuple[int, ...] = ()
        self._most = 0

    def look_again(self) -> None:
        """Before the next step, see whether a weight was replaced: it costs as much as a tenth of a step."""
        self._checked = False

    def __call__(self, tokens: np.ndarray) -> Tensor | None:
        """Hidden states [R, D] for tokens [R, 5] as StepPlan takes them; None if the model has to go layer by layer."""
        if not self._checked:
            self._renew()
        plan = self._plan
        if plan is None or len(tokens) > self._most:
            return None
        last = int((tokens[:, 2] + tokens[:, 4]).max())
        if last >= plan.positions:
            self._turn(plan, last + 1)
        return plan(tokens)

    def _renew(self) -> None:
        self._checked = True
        reason = self._why_not()
        if reason is not None:
            self._plan, self._built_from = None, ()
            if self._ready:
                log_once(f"decoding goes layer by layer: {reason}")
            return
        parts = self._parts()
        if parts == self._built_from and self._plan is not None:
            return
        self._plan, self._built_from = self._build(), parts
        first = self.lmm.family.layers(self.lmm.llm)[0].qkv
        quantized = stock(first).scales is not None
        self._most = most_rows("decode_step quantized") if quantized else most_rows("decode_step", self.lmm.dtype)

    def _why_not(self) -> str | None:
        lmm = self.lmm
        if lmm.device.type != "cpu" or lmm.dtype not in DTYPES:
            return f"one call a step runs on CPUs in float32 or bfloat16, the model is on {lmm.device} in {lmm.dtype}"
        if backend_wanted() not in (None, "cpp"):
            return f"the backend is set to {backend_wanted()}"
        if (reason := _cpp.load()[1]) != "":
            return reason
        layers = list(lmm.family.layers(lmm.llm))
        if not all(isinstance(layer, DecodeLayer) for layer in layers):
            return f"one call a step does not know the layers of {type(lmm.llm).__name__}"
        if lmm.embedding_scale != 1 or len({_signature(layer) for layer in layers}) != 1:
            return f"the layers of {type(lmm.llm).__name__} differ, or its embedding is scaled"
        rotary = getattr(lmm.llm.base_model, "rotary_emb", None)
        if getattr(rotary, "rope_type", None) not in FIXED_ANGLES:
            return f"the rotary angles of {type(lmm.llm).__name__} depend on the longest sequence"
        size = layers[0].self_attn.head_dim
        if size % 2 or size > 256 or any(w.in_features % 2 for w in _linears(layers)):
            return f"its head size is {size}, or a width is odd"
        if self._share_prefix and any(layer.window for layer in layers):
            return "its window hides rows of shared prefixes"
        return None

    def _parts(self) -> tuple[int, ...]:
        """The address of everything that a plan points to."""
        lmm = self.lmm
        layers = list(lmm.family.layers(lmm.llm))
        tensors = [lmm.family.embedding(lmm.llm).weight, lmm.llm.base_model.norm.weight, *self.pool.k, *self.pool.v]
        tensors += [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
        return tuple(t.data_ptr() for t in (*tensors, lmm.llm.base_model.rotary_emb.inv_freq))

    def _build(self) -> StepPlan:
        lmm = self.lmm
        layers = list(lmm.family.layers(lmm.llm))
        attention = layers[0].self_attn
        return StepPlan(
            [_step_layer(layer, *rows) for layer, *rows in zip(layers, self.pool.k, self.pool.v, strict=True)],
            lmm.family.embedding(lmm.llm).weight,
            lmm.llm.base_model.norm.weight,
            heads=layers[0].heads,
            eps=layers[0].input_layernorm.variance_epsilon,
            scale=attention.scaling,
        )

    def _turn(self, plan: StepPlan, positions: int) -> None:
        """Angles for so many positions and as many again: transformers' own, computed once."""
        count = max(1024, 2 * positions)
        with torch.inference_mode():
            like = torch.empty(0, dtype=plan.dtype)
            cosine, sine = self.lmm.llm.base_model.rotary_emb(like, torch.arange(count)[None])
        plan.turn(cosine[0], sine[0])


def _step_layer(layer: DecodeLayer, k: Tensor, v: Tensor) -> StepLayer:
    attention: Any = layer.self_attn
    qkv, o, gate_up, down = (Product(linear.held, linear.shift) for linear in _linears([layer]))
    norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    step = StepLayer(*norms, qkv, o, gate_up, down, k, v, window=layer.window or 0)
    if not hasattr(attention, "q_norm"):
        return step
    return step._replace(q_norm=attention.q_norm.weight, k_norm=attention.k_norm.weight)


def _linears(layers: list[DecodeLayer]) -> list[DecodeLinear]:
    return [stock(linear) for layer in layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]


def _signature(layer: DecodeLayer) -> tuple[Any, ...]:
    """Return what a plan has once for all layers."""
    attention: Any = layer.self_attn
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
    epsilons = {norm.variance_epsilon for norm in norms}
    if len(epsilons) != 1:
        return (id(layer),)
    inner = stock(layer.down).in_features
    return (layer.heads, layer.kv_heads, attention.head_dim, attention.scaling, inner, *epsilons)
