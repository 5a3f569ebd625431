"""The inference engine: requests in, answers out, in whatever order they finish.

What is computed once: the tower per image, and the K/V of the tokens that all questions about an image share. What is
packed: all prefixes in one pass, all suffixes in one pass, then one token per running sequence per step. K/V live in
one preallocated pool that the registered attention function writes and reads; a sequence leaves the batch at its own
end, and the queue refills the pool as rows come free.

Legend: R sequences, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyllava_fast.data.images import ImageMode
from tinyllava_fast.infer.decoder import PackedDecoder, Span
from tinyllava_fast.infer.images import ImageEncoder
from tinyllava_fast.infer.pool import Spans
from tinyllava_fast.infer.prompts import Prompts
from tinyllava_fast.infer.schedule import IMAGE_ROW, Group, Running, admit, group_requests, image_key, release
from tinyllava_fast.infer.types import Answer, Request

LOGIT_ROWS = 128  # rows of [R, V] logits computed at once: 25 MB in fp32 for a vocabulary of 49k
WINDOW = 4096  # requests looked at together when they are grouped by image
GROUPS_AHEAD = 256


@dataclass
class Counters:
    """What an engine has done so far. prompt_tokens counts every prompt whole; computed_tokens what was really run."""

    requests: int = 0
    images_encoded: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    decode_steps: int = 0


class Engine:
    """Runs a model of this toolkit on many requests at once. Greedy answers equal transformers' ``generate``.

    lmm: an LMM in eval mode. tokenizer: transformers tokenizer. processor: the tower's image processor.
    template: chat template of the toolkit. image_mode: "square", "pad" or "anyres", as the model was trained.
    image_grid: the resolutions (width, height) of anyres; empty: the default ones.
    batch_tokens: rows of the K/V pool; prompts and answers in flight never exceed it. prefill_tokens: most tokens of
        one prefill pass, which bounds activations (a single larger group still runs alone). threads: image decoders.
    """

    def __init__(
        self,
        lmm: Any,
        tokenizer: Any,
        processor: Any,
        template: Any,
        *,
        image_mode: ImageMode = "square",
        image_grid: Sequence[tuple[int, int]] = (),
        batch_tokens: int = 16384,
        prefill_tokens: int = 4096,
        threads: int = 2,
    ) -> None:
        self.lmm = lmm
        self.tokenizer = tokenizer
        self.processor = processor
        self.template = template
        self.batch_tokens = batch_tokens
        self.prefill_tokens = prefill_tokens
        config = lmm.llm.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        self.eos = lmm.adapter.stop_ids(lmm.llm) | {template.stop_id(tokenizer)}
        self.vocab = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
        # A window hides keys by distance, which a prefix shared between sequences has no single value of.
        self.share_prefix = not _has_window(config)
        self._images = ImageEncoder(lmm, processor, mode=image_mode, grid=image_grid, threads=threads)
        self._prompts = Prompts(template, tokenizer, self._images.rows, context, batch_tokens)
        self._decoder = PackedDecoder(lmm, batch_tokens)
        self._counters = Counters()

    @property
    def counters(self) -> Counters:
        """What has been done so far."""
        return replace(
            self._counters, images_encoded=self._images.encoded, computed_tokens=self._decoder.computed_tokens
        )

    def run(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Yield one answer per request as it finishes. The queue is read lazily, a window at a time.

        Raises UserError, naming the request, for image markers that do not match its images or a prompt that does not
        fit the model's context or the pool, and DataError for an unreadable image. One run at a time per engine.
        """
        queue = group_requests(
            self._prompts.sequences(requests),
            window=WINDOW,
            max_rows=self.batch_tokens // 2,
            share_prefix=self.share_prefix,
        )
        pool = self._decoder.pool
        waiting: list[Group] = []
        running: list[Running] = []
        try:
            while True:
                roomy = pool.rows.free_rows * 2 >= self.batch_tokens
                started = self._refill(queue, waiting) if roomy or not running else []
                if not started and not running:
                    return
                if not started:
                    self._step(running)
                going: list[Running] = []
                for sequence in running + started:
                    if not self._finished(sequence):
                        going.append(sequence)
                        continue
                    release(sequence, pool.rows)
                    yield self._answer(sequence)
                running = going
        finally:
            pool.rows = Spans(self.batch_tokens)
            self._images.forget()

    def answers(self, requests: Iterable[Request]) -> list[Answer]:
        """All answers, in the order of the requests."""
        ids: list[str] = []
        numbered: list[Request] = []
        for i, request in enumerate(requests):
            ids.append(request.id)
            numbered.append(replace(request, id=str(i)))
        by_number = {int(a.id): a for a in self.run(numbered)}
        return [replace(by_number[i], id=id_) for i, id_ in enumerate(ids)]

    def _refill(self, queue: Iterator[Group], waiting: list[Group]) -> list[Running]:
        """Admit groups while the pool has room and prefill them, a bounded number of tokens at a time."""
        started: list[Running] = []
        while True:
            if not waiting:
                waiting += islice(queue, GROUPS_AHEAD)
            groups = admit(waiting, self._decoder.pool.rows, self.prefill_tokens)
            if not groups:
                return started
            self._prefill(groups)
            started += [m for g in groups for m in g.members]

    @torch.inference_mode()
    def _prefill(self, groups: list[Group]) -> None:
        """Compute the K/V of all prompts of the groups and the first token of each sequence."""
        features = self._images.encode(g.members[0].request for g in groups)
        shared = sorted((g for g in groups if g.prefix), key=lambda g: g.start)
        if shared:
            parts = [_shown(g.members[0], features, g.prefix)[0] for g in shared]
            self._decoder([Span(g.shared_ids, g.start, features=f) for g, f in zip(shared, parts, strict=True)])
        members = sorted(((m, g) for g in groups for m in g.members), key=lambda pair: pair[0].start)
        spans = [Span(m.prompt[g.prefix :], m.start, 0, m.shared, _shown(m, features, g.prefix)[1]) for m, g in members]
        hidden = self._decoder(spans)
        last = np.cumsum([len(s.ids) for s in spans]) - 1
        self._choose([m for m, _ in members], hidden[torch.from_numpy(last).to(hidden.device)])
        for (member, _), span in zip(members, spans, strict=True):
            member.length = len(span.ids)
            self._counters.requests += 1
            self._counters.prompt_tokens += len(member.prompt)

    @torch.inference_mode()
    def _step(self, running: list[Running]) -> None:
        """One token for every running sequence."""
        running.sort(key=lambda s: s.start)
        hidden = self._decoder([Span(s.tokens[-1:], s.start, s.length, s.shared) for s in running])
        for sequence in running:
            sequence.length += 1
        self._counters.decode_steps += 1
        self._choose(running, hidden)

    def _choose(self, sequences: list[Running], hidden: Tensor) -> None:
        """Append one token to each sequence. hidden [R, D]: of the last position of each."""
        for i in range(0, len(sequences), LOGIT_ROWS):
            # Rows past the tokenizer are padding of the embedding: never trained, so they may hold any logit.
            logits = self.lmm.logits(hidden[i : i + LOGIT_ROWS])[:, : self.vocab].float()  # [R, V]
            part = sequences[i : i + LOGIT_ROWS]
            for sequence, best, row in zip(part, logits.argmax(-1).tolist(), logits, strict=True):
                if sequence.generator is not None:
                    probabilities = (row / sequence.request.sampling.temperature).softmax(-1).cpu()
                    best = int(torch.multinomial(probabilities, 1, generator=sequence.generator))
                sequence.tokens.append(best)
        self._counters.generated_tokens += len(sequences)

    def _finished(self, sequence: Running) -> bool:
        tokens = sequence.tokens
        return tokens[-1] in self.eos or len(tokens) >= sequence.request.sampling.max_new_tokens

    def _answer(self, sequence: Running) -> Answer:
        tokens = sequence.tokens
        ended = tokens[-1] in self.eos
        return Answer(
            id=sequence.request.id,
            # Not every tokenizer counts the end token of its chat template as a special one.
            text=self.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True).strip(),
            tokens=tokens,
            finish="eos" if ended else "length",
            prompt_tokens=len(sequence.prompt),
        )


def _shown(sequence: Running, features: dict[object, Tensor], cut: int) -> tuple[list[Tensor], list[Tensor]]:
    """Features of the images in the prompt's first ``cut`` tokens, where no image is cut, and of those after."""
    images = sequence.request.images
    rows = [features[image_key(images[i])] for i in sequence.shown]
    before, count = sequence.prompt[:cut].count(IMAGE_ROW), 0
    while before > 0:
        before -= len(rows[count])
        count += 1
    return rows[:count], rows[count:]


def _has_window(config: Any) -> bool:
    """True if some layer attends only to the last tokens."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    return bool(getattr(config, "sliding_window", None))
