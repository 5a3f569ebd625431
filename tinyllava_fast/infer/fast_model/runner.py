"""Packed passes of the decoder against the K/V pool.

Legend: T packed tokens of a pass, S sequences, D hidden width, K tokens an image, P pool rows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinyllava_fast.infer.fast_model.adapters import Adapters
from tinyllava_fast.infer.fast_model.compiled_step import CompiledStep, StepTokens
from tinyllava_fast.infer.fast_model.fused_step import FusedStep
from tinyllava_fast.infer.fast_model.graph_step import GraphStep
from tinyllava_fast.infer.fast_model.positions import has_fixed_angles
from tinyllava_fast.infer.fast_model.prepare import PreparedModel
from tinyllava_fast.infer.scheduling.images import image_key
from tinyllava_fast.infer.scheduling.pool import KVPool
from tinyllava_fast.infer.scheduling.sequence import IMAGE_ROW, Group, Sequence
from tinyllava_fast.log import log_once
from tinyllava_fast.models.attention import KVView


@dataclass(frozen=True)
class Span:
    """New tokens of one sequence in a pass.

    ids: tokens, IMAGE_ROW where the next row of ``features`` goes. start: first pool row of the sequence's own tokens.
    done: own rows already written. shared_rows: (start, length) of the pool's rows that the sequence begins with.
    features: [rows, D] of what lies of each image among the tokens, in order. adapter: its number, 0 for none.
    """

    ids: list[int]
    start: int
    done: int = 0
    shared_rows: tuple[int, int] = (0, 0)
    features: Items[Tensor] = ()
    adapter: int = 0


class PackedDecoder:
    """Runs an LMM's decoder over spans of new tokens; K and V go to the pool's rows."""

    def __init__(self, model: PreparedModel, rows: int, *, share_prefix: bool, compile: bool | None = None) -> None:
        """share_prefix: whether sequences share rows. compile: as CompiledStep takes it."""
        self.lmm = lmm = model.lmm
        self.adapters = Adapters(lmm)
        self.pool = KVPool(rows, lmm.num_kv_heads, lmm.head_dim, dtype=lmm.dtype, device=lmm.device)
        self.computed_tokens = self.steps = 0
        self._share_prefix = share_prefix
        self._run_step = CompiledStep(lmm, self.pool, compile)
        in_one_call = not compile and lmm.device.type == "cpu"
        self._fused = FusedStep(model, self.pool, share_prefix=share_prefix) if in_one_call else None
        self.graphs: GraphStep | None = None
        """The step that chooses tokens on the device, on a GPU unless ``compile`` says otherwise."""
        if compile is None and lmm.device.type == "cuda" and has_fixed_angles(lmm.llm.config.get_text_config()):
            self.use_graphs(model, capture=True)

    def use_graphs(self, model: PreparedModel, *, capture: bool) -> None:
        """Let ``choose`` do steps of decoding. capture: see GraphStep."""
        step = self._run_step.plain
        self.graphs = GraphStep(model, self.pool, step, share_prefix=self._share_prefix, capture=capture)

    def __call__(self, spans: list[Span]) -> Tensor:
        """Hidden states [T, D] of the spans' tokens, laid end to end. Spans must ascend by start."""
        lengths = np.array([len(s.ids) for s in spans])
        ids = np.concatenate([np.array(s.ids, dtype=np.int64) for s in spans])
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        done = np.array([s.done for s in spans])
        starts = np.array([s.start for s in spans])
        shared = np.array([s.shared_rows for s in spans])
        # Index of each token among its sequence's own tokens.
        steps = np.arange(len(ids)) + np.repeat(done - bounds[:-1], lengths)
        view = KVView(
            k=self.pool.k,
            v=self.pool.v,
            slots=self._tensor(steps + np.repeat(starts, lengths)),
            cu_seqlens_q=self._tensor(bounds, torch.int32),
            cu_seqlens_k=self._tensor(np.append(starts, self.pool.rows.size), torch.int32),
            seqused_k=self._tensor(done + lengths, torch.int32),
            prefix=self._tensor(shared, torch.int32) if shared.any() else None,
        )
        self.computed_tokens += len(ids)
        for one in (self._fused, self.graphs):
            if one is not None:
                one.look_again()
        embeds = self._embed(ids, [f for s in spans for f in s.features])
        with self._adapted(np.repeat([s.adapter for s in spans], lengths)):
            return self.lmm.decode(embeds, self._tensor(steps + np.repeat(shared[:, 1], lengths)), kv=view)

    def prefill(
        self,
        groups: Items[Group],
        sequences: Items[Sequence],
        stops: Items[int],
        features: Mapping[object, Tensor],
    ) -> tuple[Tensor, np.ndarray]:
        """Compute what the prompts of each group share, then each sequence's tokens up to its stop; K and V are pooled.

        sequences: all members of the groups and others, ascending by start. features: [rows, D] of each image, by
        image_key.
        Returns hidden states [T, D] of the tokens, sequence after sequence, and the row of each one's last token [R].
        """
        if not sequences:
            return torch.empty(0, self.lmm.hidden_size), np.empty(0, dtype=np.int64)
        sharing = sorted((g for g in groups if g.num_shared_tokens), key=lambda g: g.shared_start)
        if sharing:
            parts = [_features(g.members[0], 0, g.num_shared_tokens, features) for g in sharing]
            self([_shared_span(g, f) for g, f in zip(sharing, parts, strict=True)])
        spans = []
        for sequence, stop in zip(sequences, stops, strict=True):
            first = sequence.num_cached_tokens
            ids = sequence.ids_between(first, stop)
            rows = _features(sequence, first, stop, features)
            place = sequence.start, sequence.num_own_cached, sequence.shared_rows
            spans.append(Span(ids, *place, rows, sequence.adapter))
        return self(spans), np.cumsum([len(s.ids) for s in spans]) - 1

    def verify(self, sequences: Items[Sequence], guesses: Mapping[Sequence, list[int]]) -> Tensor:
        """Hidden states [T, D] of the last token of each sequence and of the guesses behind it, in their order.

        K and V of guesses go to the rows behind; those of wrong ones are overwritten by what comes in their place.
        """
        self.steps += 1
        ids = [[s.tokens[-1], *guesses.get(s, ())] for s in sequences]
        hidden = self._in_one_call(sequences, ids)
        if hidden is not None:
            return hidden
        return self(
            [
                Span(names, s.start, s.num_own_cached, s.shared_rows, adapter=s.adapter)
                for s, names in zip(sequences, ids, strict=True)
            ]
        )

    def step(self, sequences: Items[Sequence]) -> Tensor:
        """Hidden states [R, D] of the last token of each sequence, which is at least one. They must ascend by start."""
        rows = _rows(sequences)
        self.computed_tokens += len(rows)
        self.steps += 1
        if len(self.adapters) and any(s.adapter for s in sequences):
            log_once("steps in which a request has an adapter go layer by layer", logging.INFO)
            with self._adapted([s.adapter for s in sequences]):
                return self._run_step.plain(self._step_tokens(rows))
        hidden = None if self._fused is None else self._fused(rows)
        return self._run_step(self._step_tokens(rows)) if hidden is None else hidden

    def choose(self, sequences: Items[Sequence], vocab: int) -> list[int] | None:
        """Do a step, and return the token that follows in each sequence; None if ``step`` has to do it.

        vocab: tokens that may be chosen. A token is -1 where the logits, ``graphs.logits``, are no numbers. Shapings
        and adapters are not known here. The sequences must ascend by start.
        """
        if self.graphs is None or any(s.shaping is not None or s.adapter for s in sequences):
            return None
        settings = [s.request.sampling for s in sequences], [len(s.tokens) for s in sequences]
        chosen = self.graphs(_rows(sequences), *settings, vocab)
        if chosen is not None:
            self.computed_tokens += len(chosen)
            self.steps += 1
        return chosen

    def step_with_riders(
        self, sequences: Items[Sequence], stops: Items[int], features: Mapping[object, Tensor]
    ) -> tuple[Tensor, np.ndarray]:
        """Compute tokens up to their stops of sequences that decode, one each, and of prompts, a few, in one pass.

        Arguments and results as of ``prefill``.
        """
        self.steps += 1
        pairs = list(zip(sequences, stops, strict=True))
        if any(s.images_between(s.num_cached_tokens, stop) for s, stop in pairs):
            return self.prefill((), sequences, stops, features)
        ids = [s.ids_between(s.num_cached_tokens, stop) for s, stop in pairs]
        hidden = self._in_one_call(sequences, ids)
        if hidden is None:
            return self.prefill((), sequences, stops, features)
        return hidden, np.cumsum([len(names) for names in ids]) - 1

    def _in_one_call(self, sequences: Items[Sequence], ids: Items[Items[int]]) -> Tensor | None:
        """Hidden states of the next tokens of each sequence; None if the layers have to go one by one.

        Each token is a row of its own: K and V of all rows of a layer are in the pool before any row looks at them, so
        it sees those before it and itself.
        """
        if self._fused is None or any(s.adapter for s in sequences):
            return None
        rows = [
            (name, s.start, s.num_own_cached + place, *s.shared_rows)
            for s, names in zip(sequences, ids, strict=True)
            for place, name in enumerate(names)
        ]
        hidden = self._fused(np.array(rows, dtype=np.int64))
        self.computed_tokens += 0 if hidden is None else len(rows)
        return hidden

    def _adapted(self, numbers: Items[int] | np.ndarray) -> AbstractContextManager[None]:
        """The block in which rows go through the adapters of these numbers."""
        return self.adapters.current.of(numbers, self.lmm.device) if len(self.adapters) else nullcontext()

    def _step_tokens(self, rows: np.ndarray) -> StepTokens:
        """Return the rows [R, 5] that FusedStep takes in the form that attention takes."""
        count = len(rows)
        last, start, length, shared_start, num_shared = rows.T
        wide = self._tensor(np.stack([last, length + num_shared, start + length]))
        bounds = np.arange(count + 1)
        shared = np.stack([shared_start, num_shared], 1).ravel()
        short = self._tensor(np.concatenate([bounds, start, [self.pool.rows.size], length + 1, shared]), torch.int32)
        cu_q, cu_k, used, spans = short.split([count + 1, count + 1, count, 2 * count])
        shares = spans.view(count, 2) if self._share_prefix else None
        ids, positions, slots = wide.unbind()
        return StepTokens(ids, positions, slots, cu_q, cu_k, used, shares)

    def _embed(self, ids: np.ndarray, features: list[Tensor]) -> Tensor:
        lmm = self.lmm
        rows = torch.cat(features) if features else torch.empty(0, lmm.hidden_size, dtype=lmm.dtype, device=lmm.device)
        slots = self._tensor(np.flatnonzero(ids == IMAGE_ROW))
        return lmm.embed(self._tensor(np.maximum(ids, 0)), rows, slots)

    def _tensor(self, values: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.lmm.device, dtype)


def _rows(sequences: Items[Sequence]) -> np.ndarray:
    """The newest token of each sequence as StepPlan takes it, [R, 5]."""
    return np.array([(s.tokens[-1], s.start, s.num_own_cached, *s.shared_rows) for s in sequences], dtype=np.int64)


def _shared_span(group: Group, features: Items[Tensor]) -> Span:
    return Span(group.shared_ids, group.shared_start, features=features, adapter=group.members[0].adapter)


def _features(sequence: Sequence, start: int, stop: int, features: Mapping[object, Tensor]) -> list[Tensor]:
    """Return the rows of the images that lie among the tokens [start, stop) of a sequence."""
    return [features[image_key(image)][rows] for image, rows in sequence.images_between(start, stop)]
