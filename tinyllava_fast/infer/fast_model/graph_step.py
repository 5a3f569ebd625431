"""The decoding step of a GPU: layers, logits and the choice of tokens as one CUDA graph, one launch and one copy back.

A small model's step is hundreds of kernels that are done before Python has launched the next. A graph is recorded once
for a number of sequences, in buckets; what varies - tokens, rows of the pool, settings of the draws - lies in buffers
that it reads. Rows beyond the batch repeat its last one: they write the same K and V to the same place.

Legend: R sequences, B rows of the buffers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyllava_fast.infer.device_sampling import COLUMNS, Draws, draw_rows, needs_order, tokens
from tinyllava_fast.infer.fast_model.compiled_step import StepTokens
from tinyllava_fast.infer.fast_model.prepare import PreparedModel
from tinyllava_fast.infer.scheduling.pool import KVPool
from tinyllava_fast.infer.types import Sampling
from tinyllava_fast.log import log

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of sequences that graphs are recorded for. Larger batches go layer by layer."""
WARM_UP = 2
"""Runs before a recording: kernels are compiled and libraries take their workspaces."""
_FIELDS = 5
Key = tuple[int, bool, int]  # rows, whether draws need an order, V


class GraphStep:
    """Chooses the next token of each sequence.

    share_prefix: whether sequences share rows. step: hidden states of StepTokens, layer by layer. capture: record and
    replay graphs; False: the same calls one by one, as on devices that have no graphs.
    """

    def __init__(
        self,
        model: PreparedModel,
        pool: KVPool,
        step: Callable[[StepTokens], Tensor],
        *,
        share_prefix: bool,
        capture: bool,
    ) -> None:
        self._model, self._pool, self._step = model, pool, step
        self._share_prefix, self._capture = share_prefix, capture
        device, most = model.lmm.device, BUCKETS[-1]
        self._host_rows = torch.zeros(most, _FIELDS, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._host_draws = torch.zeros(most, COLUMNS, dtype=torch.float64, pin_memory=device.type == "cuda")
        self._rows, self._draws = self._host_rows.to(device, copy=True), self._host_draws.to(device, copy=True)
        self._bounds = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._end = torch.full((1,), pool.rows.size, dtype=torch.int32, device=device)
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._memory: Any = None  # that all graphs share
        self._recorded_from: tuple[int, ...] = ()  # the addresses of all tensors that they read
        self._checked = False
        self.logits = torch.empty(0)
        """[R, V] of the last step, until the next."""

    def look_again(self) -> None:
        """Before the next step, see whether a weight was replaced, whose graphs would read what is gone."""
        self._checked = False

    def __call__(
        self, rows: np.ndarray, samplings: Sequence[Sampling], places: Sequence[int], vocab: int
    ) -> list[int] | None:
        """Return the tokens; -1 for a sequence whose logits are no numbers. None: the batch has no bucket.

        rows: [R, 5] int64, as StepPlan takes them, R >= 1. places: how many tokens each sequence has generated before.
        vocab: V, tokens that may be chosen.
        """
        count = len(rows)
        if count > BUCKETS[-1]:
            return None
        size = next(bucket for bucket in BUCKETS if bucket >= count)
        settings = draw_rows(samplings, places)
        self._fill(size, rows, settings)
        found, logits = self._run((size, needs_order(settings), vocab))
        self.logits = logits[:count]
        chosen: list[int] = found[:count].tolist()
        return chosen

    def _fill(self, size: int, rows: np.ndarray, settings: np.ndarray) -> None:
        """Send a batch and the rows of its bucket beyond it. The copies of the step before are done: it was read."""
        count = len(rows)
        whole, draws = self._host_rows.numpy(), self._host_draws.numpy()
        whole[:count], draws[:count] = rows, settings
        whole[count:size], draws[count:size] = rows[-1], settings[-1]
        self._rows[:size].copy_(self._host_rows[:size], non_blocking=True)
        self._draws[:size].copy_(self._host_draws[:size], non_blocking=True)

    def compute(self, key: Key) -> tuple[Tensor, Tensor]:
        """(tokens [B], logits [B, V]) of what lies in the buffers; nothing of it waits for the device."""
        size, order, vocab = key
        ids, start, length, shared_start, num_shared = self._rows[:size].unbind(1)
        shares = torch.stack([shared_start, num_shared], 1).int() if self._share_prefix else None
        first = torch.cat([start.int(), self._end])
        at = StepTokens(
            ids, length + num_shared, start + length, self._bounds[: size + 1], first, (length + 1).int(), shares
        )
        logits = self._model.logits(self._step(at))[:, :vocab]
        return tokens(logits, Draws(*self._draws[:size].unbind(1)), order=order), logits

    def _run(self, key: Key) -> tuple[Tensor, Tensor]:
        if not self._capture:
            return self.compute(key)
        self._renew()
        if key not in self._graphs:
            log.info("recording the step of %d sequences%s", key[0], ", with ordered draws" if key[1] else "")
            try:
                self._graphs[key] = self._record(key)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                log.warning("steps are launched kernel by kernel, not as a graph: %s", str(error).partition("\n")[0])
                self._capture = False
                return self.compute(key)
        graph, found, logits = self._graphs[key]
        graph.replay()
        return found, logits

    def _renew(self) -> None:
        """Forget the graphs if a tensor that they read lies elsewhere now."""
        if self._checked:
            return
        llm = self._model.lmm.llm
        every = (*llm.parameters(), *llm.buffers(), *self._pool.k, *self._pool.v)
        parts = tuple(tensor.data_ptr() for tensor in every)
        if parts != self._recorded_from:
            self._graphs.clear()
        self._recorded_from, self._checked = parts, True

    def _record(self, key: Key) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Record one graph. The runs ahead of it write the same K and V to the same rows as its replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.compute(key)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._memory):
            found, logits = self.compute(key)
        return graph, found, logits
