"""One token for each running sequence, compiled where that pays.

Two graphs at most: one for a batch of one, whose latency counts, and one for every larger batch, whose size is a
symbol, since sequences leave and join all the time and a graph for each size would take longer than it saves.

Legend: R sequences, D hidden width, P pool rows.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from tinyllava_fast.infer.pool import KVPool
from tinyllava_fast.log import log
from tinyllava_fast.models.attention import KVView

SECONDS_A_LAYER = 1.5  # what compiling takes; one core


class CompiledStep:
    """The decoder on one new token a sequence.

    compile: True: at the first step. False: never. None: once plain steps have taken as long as compiling would, so
    that the whole is at most twice the better of the two, however long the queue turns out to be. Where compiling fails
    (no C++ compiler), a warning says so and plain steps go on.
    """

    def __init__(self, lmm: Any, pool: KVPool, compile: bool | None) -> None:
        self.lmm = lmm
        self.pool = pool
        self.compile = compile
        self._seconds = {False: 0.0, True: 0.0}  # of plain steps, by whether the batch is one sequence
        self._graphs: dict[bool, Any] = {}

    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        used: Tensor,
        prefix: Tensor | None,
    ) -> Tensor:
        """Hidden states [R, D]. ids, positions, slots: [R] int64; the others as in KVView."""
        arguments = (ids, positions, slots, cu_q, cu_k, used, prefix)
        single = len(ids) == 1
        if single not in self._graphs and self._pays(single):
            self._graphs[single] = torch.compile(self._plain, fullgraph=True, dynamic=False if single else None)
            log.info("compiling the step of %s", "one sequence" if single else "several sequences")
            return self._first(single, arguments)
        if graph := self._graphs.get(single):
            if not single:
                _mark_sizes(arguments)
            return graph(*arguments, self.pool.k, self.pool.v)
        began = time.perf_counter()
        hidden = self._plain(*arguments, self.pool.k, self.pool.v)
        self._seconds[single] += time.perf_counter() - began
        return hidden

    def _pays(self, single: bool) -> bool:
        if self.compile is None:
            return self._seconds[single] > SECONDS_A_LAYER * self.lmm.num_layers
        return self.compile

    def _first(self, single: bool, arguments: tuple[Any, ...]) -> Tensor:
        """The call that compiles."""
        try:
            if not single:
                _mark_sizes(arguments)
            return self._graphs[single](*arguments, self.pool.k, self.pool.v)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            log.warning("the step is not compiled: %s", str(error).partition("\n")[0])
            self.compile = False
            self._graphs.clear()
            return self._plain(*arguments, self.pool.k, self.pool.v)

    def _plain(
        self,
        ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        used: Tensor,
        prefix: Tensor | None,
        k: list[Tensor],
        v: list[Tensor],
    ) -> Tensor:
        lmm = self.lmm
        view = KVView(k, v, slots, cu_q, cu_k, used, prefix, single=True)
        embeds = nn.functional.embedding(ids, lmm.adapter.embedding(lmm.llm).weight)
        return lmm.decode(lmm.scale_embeddings(embeds), positions, kv=view)


def _mark_sizes(arguments: tuple[Tensor | None, ...]) -> None:
    """Tell the compiler that the number of sequences will change."""
    for tensor in arguments:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
