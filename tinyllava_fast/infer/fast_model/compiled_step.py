"""One token for each running sequence, compiled where that pays.

Two graphs at most: one for a batch of one, whose latency counts, and one for every larger batch, whose size is a
symbol, since sequences leave and join all the time and a graph for each size would take longer than it saves.

Legend: R sequences, D hidden width, P pool rows.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tinyllava_fast.infer.fast_model.decoder_layer import DecodeLayer
from tinyllava_fast.infer.scheduling.pool import KVPool
from tinyllava_fast.log import log
from tinyllava_fast.models.attention import KVView
from tinyllava_fast.ops._op import unchecked
from tinyllava_fast.ops._policy import COMPILE_SECONDS_A_LAYER

BACKEND = "inductor"


class StepTokens(NamedTuple):
    """The newest token of each sequence and where its keys are."""

    ids: Tensor  # [R] int64
    positions: Tensor  # [R] int64
    slots: Tensor  # [R] int64: pool row of each token
    cu_q: Tensor  # [R + 1] int32: these and the following as in KVView
    cu_k: Tensor  # [R + 1] int32
    used: Tensor  # [R] int32
    shared_rows: Tensor | None  # [R, 2] int32: as prefix of KVView


class CompiledStep:
    """The decoder on one new token a sequence.

    compile: True: at the first step. False: never. None: once plain steps have taken as long as compiling would, so
    that the whole is at most twice the better of the two, however long the queue turns out to be; never for the fused
    layers of decoder_layer.py, whose calls cost more from a graph than directly (ops/_policy.py). Where compiling fails
    (no C++ compiler), a warning says so and plain steps go on.
    """

    def __init__(self, lmm: Any, pool: KVPool, compile: bool | None) -> None:
        self.lmm = lmm
        self.pool = pool
        self.compile = compile
        self._seconds = {False: 0.0, True: 0.0}  # of plain steps, by whether the batch is one sequence
        self._checked = 0  # sequences of the last plain step: ops need not look at the same shapes again
        self._graphs: dict[bool, Callable[..., Tensor]] = {}

    def __call__(self, tokens: StepTokens) -> Tensor:
        """Hidden states [R, D]."""
        single = tokens.ids.shape[0] == 1
        if single not in self._graphs and self._pays(single):
            self._graphs[single] = _compiled(self._plain, dynamic=False if single else None)
            log.info("compiling the step of %s", "one sequence" if single else "several sequences")
            return self._first(single, tokens)
        if single in self._graphs:
            return self._call(single, tokens)
        began = time.perf_counter()
        with unchecked() if len(tokens.ids) == self._checked else contextlib.nullcontext():
            hidden = self._plain(*tokens, self.pool.k, self.pool.v)
        self._checked = len(tokens.ids)
        self._seconds[single] += time.perf_counter() - began
        return hidden

    def plain(self, tokens: StepTokens) -> Tensor:
        """Return hidden states [R, D] without a graph, whatever pays: of a step that graphs do not know."""
        return self._plain(*tokens, self.pool.k, self.pool.v)

    def _pays(self, single: bool) -> bool:
        if self.compile is None:
            fused = isinstance(self.lmm.family.layers(self.lmm.llm)[0], DecodeLayer)
            a_layer = COMPILE_SECONDS_A_LAYER["fused decoding" if fused else "decoding"]
            return self._seconds[single] > a_layer * self.lmm.num_layers
        return self.compile

    def _first(self, single: bool, tokens: StepTokens) -> Tensor:
        """The call that compiles."""
        try:
            return self._call(single, tokens)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            log.warning("the step is not compiled: %s", str(error).partition("\n")[0])
            self.compile = False
            self._graphs.clear()
            return self._plain(*tokens, self.pool.k, self.pool.v)

    def _call(self, single: bool, tokens: StepTokens) -> Tensor:
        if not single:
            for tensor in tokens:
                if tensor is not None:  # tell the compiler that the number of sequences will change
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return self._graphs[single](*tokens, self.pool.k, self.pool.v)

    def _plain(
        self,
        ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        used: Tensor,
        shared_rows: Tensor | None,
        k: list[Tensor],
        v: list[Tensor],
    ) -> Tensor:
        lmm = self.lmm
        view = KVView(k, v, slots, cu_q, cu_k, used, shared_rows, single=True)
        embeds = nn.functional.embedding(ids, lmm.family.embedding(lmm.llm).weight)
        return lmm.decode(lmm.scale_embeddings(embeds), positions, kv=view)


def _compiled(run: Callable[..., Tensor], dynamic: bool | None) -> Callable[..., Tensor]:
    """torch.compile with the guards that can fail here: those on the arguments.

    Checking 300 weights before each token takes a tenth of the token's time. They may only go where each graph is the
    only one of its function, or the graph of one model could be taken for another's.
    """
    extra: dict[str, Any] = {}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        extra = {"isolate_recompiles": True, "options": {"guard_filter_fn": _argument_guards}}
    compiled: Callable[..., Tensor] = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=BACKEND, **extra)
    return compiled


def _argument_guards(entries: Sequence[Any]) -> list[bool]:
    return [
        e.guard_type == "SHAPE_ENV" or (e.guard_type == "TENSOR_MATCH" and not isinstance(e.value, nn.Parameter))
        for e in entries
    ]
