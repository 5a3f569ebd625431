"""The inference engine: requests in, answers out, in whatever order they finish.

What is computed once: the tower per image, and the K/V of the tokens that all questions about an image share. What is
packed: all prefixes in one pass, all suffixes in one pass, then one token per running sequence per step. K/V live in
one preallocated pool that the registered attention function writes and reads; a sequence leaves the batch at its own
end, and the queue refills the pool as rows come free.

Legend: R sequences, T tokens of a pass, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyllava_fast.data.images import ImageMode
from tinyllava_fast.data.tokenizer import largest_id
from tinyllava_fast.errors import CheckpointError, UserError
from tinyllava_fast.infer.fast_model.prepare import PreparedModel
from tinyllava_fast.infer.fast_model.runner import PackedDecoder
from tinyllava_fast.infer.finish import CONTEXT
from tinyllava_fast.infer.sampling import all_finite, next_tokens
from tinyllava_fast.infer.scheduling.admission import Running, group_requests
from tinyllava_fast.infer.scheduling.batch import Batch, Limits
from tinyllava_fast.infer.scheduling.images import ImageEncoder
from tinyllava_fast.infer.scheduling.pool import row_bytes
from tinyllava_fast.infer.scheduling.prompts import Prompts
from tinyllava_fast.infer.scoring import Collector, log_probabilities
from tinyllava_fast.infer.types import Answer, Request, Scores
from tinyllava_fast.models.build import check_vocabulary
from tinyllava_fast.models.lmm import LMM

LOGIT_ROWS = 128  # rows of [R, V] logits computed at once: 25 MB in fp32 for a vocabulary of 49k
BATCH_TOKENS = 16384

OnToken = Callable[[str, str], None]


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

    model: a PreparedModel, or an LMM in eval mode, which is left as it is. tokenizer: transformers tokenizer.
    processor: the tower's image processor.
    template: chat template of the toolkit. image_mode: "square", "pad" or "anyres", as the model was trained.
    image_grid: the resolutions (width, height) of anyres; empty: the default ones.
    batch_tokens: rows of the K/V pool, which prompts and answers in flight never exceed (default 16384);
        kv_cache_bytes: its size in bytes instead, a row being K and V of one token in every layer. Give one of them.
    prefill_tokens: most tokens of one prefill pass, which bounds activations (a single larger prompt still runs alone).
    lookahead: requests read ahead and grouped by image; those about one image should be no further apart.
    threads: image decoders. compile: the decode step; True, False, or None: when it pays (compiled_step.py).
    source: what the model is called in messages, its folder.
    UserError for a pool too small to hold anything, and for a tokenizer with ids that the model has no embedding for.
    """

    def __init__(
        self,
        model: LMM | PreparedModel,
        tokenizer: Any,
        processor: Any,
        template: Any,
        *,
        image_mode: ImageMode = "square",
        image_grid: Sequence[tuple[int, int]] = (),
        batch_tokens: int | None = None,
        kv_cache_bytes: int | None = None,
        prefill_tokens: int = 4096,
        lookahead: int = 256,
        threads: int = 2,
        compile: bool | None = None,
        source: str | Path = "",
    ) -> None:
        self.model = PreparedModel(model) if isinstance(model, LMM) else model
        self.lmm = lmm = self.model.lmm
        self.source = str(source) or type(lmm.llm).__name__
        self.tokenizer = tokenizer
        self.processor = processor
        self.template = template
        self.batch_tokens = _pool_rows(lmm, batch_tokens, kv_cache_bytes)
        self.lookahead = lookahead
        config = lmm.llm.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        self.eos = lmm.family.stop_ids(lmm.llm) | {template.stop_id(tokenizer)}
        check_vocabulary(lmm, tokenizer)
        self.vocab = largest_id(tokenizer)[1] + 1
        # A window hides keys by distance, which a prefix shared between sequences has no single value of.
        self.share_prefix = not _has_window(config)
        self._images = ImageEncoder(lmm, processor, mode=image_mode, grid=image_grid, threads=threads)
        self._prompts = Prompts(
            template, tokenizer, self._images.rows, context, self.batch_tokens, self.eos, ahead=lookahead
        )
        self._decoder = PackedDecoder(self.model, self.batch_tokens, share_prefix=self.share_prefix, compile=compile)
        self._limits = Limits(prefill_tokens)
        self._counters = Counters()

    @property
    def counters(self) -> Counters:
        """What has been done so far."""
        return replace(
            self._counters,
            images_encoded=self._images.encoded,
            computed_tokens=self._decoder.computed_tokens,
            decode_steps=self._decoder.steps,
        )

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the K/V pool."""
        return self._decoder.pool.nbytes

    def run(
        self, requests: Iterable[Request], on_token: OnToken | None = None, *, keep_going: bool = False
    ) -> Iterator[Answer]:
        """Yield one answer per request as it finishes. The queue is read lazily, ``lookahead`` requests at a time.

        on_token: called with a request's id and the next piece of its text, whole characters only, as soon as it is
        certain; the pieces of a request add up to its answer's text.
        Raises UserError, naming the request, for image markers that do not match its images or a prompt that does not
        fit the model's context or the pool, and DataError for an unreadable image. keep_going: what is wrong with one
        request costs that request alone: see Answer.finish. A prompt that the context has room for but the pool has not
        still raises, and so does a model whose numbers are not finite (CheckpointError). One run at a time per engine.
        """

        def handle(sequences: list[Running], hidden: Tensor, ends: np.ndarray) -> None:
            self._generate(sequences, hidden, ends, on_token)

        refused: list[Running] = []
        refuse = refused.append if keep_going else None
        sequences = self._prompts.sequences(requests, on_token is not None, refuse)
        for sequence in self._batch(sequences, handle, keep_going).finished():
            yield from self._drain(refused)
            self._count(sequence)
            yield self._answer(sequence)
        yield from self._drain(refused)

    def surely_fits(self, request: Request) -> bool:
        """Return whether a request is so short that ``refusals`` cannot find it too long. Costs no tokenizing."""
        return self._prompts.surely_fits(request)

    def refusals(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """The empty answers of ``run`` with keep_going to prompts that cannot be put to the model, without running any.

        Raises UserError for a prompt that does not fit the pool. Images are not decoded, so unreadable ones are found
        here only where a prompt's length depends on their size.
        """
        refused: list[Running] = []
        for _ in self._prompts.sequences(requests, refuse=refused.append):
            yield from self._drain(refused)
        yield from self._drain(refused)

    def answers(self, requests: Iterable[Request], on_token: OnToken | None = None) -> list[Answer]:
        """All answers, in the order of the requests. on_token: as for ``run``.

        In messages, requests whose ids are missing or not unique are called by their number, from 0; one alone is not.
        """
        ids: dict[str, str] = {}  # what tells it from the others -> its own id
        source = iter(requests)
        first = list(islice(source, 2))

        def unique() -> Iterator[Request]:
            for number, request in enumerate(chain(first, source)):
                name = request.id
                if len(first) > 1 and (not name or name in ids):
                    name = next(n for n in (str(number) + "'" * i for i in count()) if n not in ids)
                ids[name] = request.id
                yield replace(request, id=name)

        def named(name: str, piece: str) -> None:
            if on_token is not None:
                on_token(ids[name], piece)

        found = {a.id: a for a in self.run(unique(), named if on_token is not None else None)}
        return [replace(found[name], id=own) for name, own in ids.items()]

    def score(self, questions: Iterable[tuple[Request, Sequence[str]]]) -> Iterator[Scores]:
        """How probable each option is as the answer to its request; yields a question when all its options are done.

        The tower runs once per image, the K/V of what the prompts about an image share are computed once, and all
        options are packed behind them; nothing is generated, and the requests' ``sampling`` has no effect.
        UserError for a question without options, and as for ``run``.
        """
        collector = Collector()

        def handle(sequences: list[Running], hidden: Tensor, ends: np.ndarray) -> None:
            for sequence, result in zip(sequences, self._log_probabilities(sequences, hidden, ends), strict=True):
                sequence.result, sequence.finish = result, "scored"

        sequences = self._prompts.scored(collector.watch(questions))
        for sequence in self._batch(collector.register(sequences), handle).finished():
            done = collector.add(sequence)
            if done is not None:
                self._count(sequence)
                yield done

    def _drain(self, refused: list[Running]) -> Iterator[Answer]:
        while refused:
            sequence = refused.pop(0)
            self._count(sequence)
            yield self._answer(sequence)

    def _batch(self, sequences: Iterator[Running], handle: Any, keep_going: bool = False) -> Batch:
        queue = group_requests(
            sequences, window=self.lookahead, max_rows=self.batch_tokens // 2, share_prefix=self.share_prefix
        )
        return Batch(self._decoder, self._images, queue, handle, self._limits, keep_going)

    def _generate(self, sequences: list[Running], hidden: Tensor, ends: np.ndarray, on_token: OnToken | None) -> None:
        """Append one token to each sequence and note where it ends. hidden [T, D]; ends [R]: rows of last tokens."""
        if len(ends) < len(hidden):
            hidden = hidden[torch.from_numpy(ends).to(hidden.device)]
        chosen: list[int] = []
        for i in range(0, len(sequences), LOGIT_ROWS):
            # Rows past the tokenizer are padding of the embedding: never trained, so they may hold any logit.
            rows = hidden[i : i + LOGIT_ROWS]
            logits = self.model.logits(rows)[:, : self.vocab]  # [R, V]
            part = sequences[i : i + LOGIT_ROWS]
            self._check_finite(part, rows, logits)
            chosen += next_tokens(logits, [s.request.sampling for s in part], [len(s.tokens) for s in part])
        self._counters.generated_tokens += len(sequences)
        for sequence, token in zip(sequences, chosen, strict=True):
            piece = _advance(sequence, token)
            if piece and on_token is not None:
                on_token(sequence.request.id, piece)

    def _log_probabilities(self, sequences: list[Running], hidden: Tensor, ends: np.ndarray) -> list[Any]:
        rows = np.concatenate([np.arange(e - len(s.scored), e) + 1 for s, e in zip(sequences, ends, strict=True)])
        hidden = hidden[torch.from_numpy(rows).to(hidden.device)]
        targets = torch.tensor([t for s in sequences for t in s.scored], device=hidden.device)
        each, best = log_probabilities(self.model.logits, hidden, targets, rows=LOGIT_ROWS, vocab=self.vocab)
        self._check_finite(sequences, hidden, each)
        counts = [len(s.scored) for s in sequences]
        return list(zip(each.split(counts), best.split(counts), strict=True))

    def _check_finite(self, sequences: Sequence[Running], *numbers: Tensor) -> None:
        """CheckpointError if some number is none, before any choice is made of them: a token, a score."""
        if all(all_finite(some) for some in numbers):
            return
        dtype = str(self.lmm.dtype).removeprefix("torch.")
        remedy = "; in float16 they may have overflowed: try dtype bfloat16" if dtype == "float16" else ""
        names = ", ".join(s.request.named for s in sequences[:3]) + ", ..." * (len(sequences) > 3)
        raise CheckpointError(
            f"{self.source}: the model's numbers are not finite (nan or infinity) for {names}: a weight is "
            f"damaged or the training diverged; take an earlier checkpoint or copy the folder again{remedy}"
        )

    def _count(self, sequence: Running) -> None:
        self._counters.requests += 1
        self._counters.prompt_tokens += len(sequence.prompt)

    def _answer(self, sequence: Running) -> Answer:
        tokens = sequence.tokens
        # Not every tokenizer counts the end token of its chat template as a special one.
        said = tokens[:-1] if sequence.finish == "eos" else tokens
        if sequence.text is not None:
            text = sequence.text.text
        else:
            text = self.tokenizer.decode(said, skip_special_tokens=True).strip()
        finish = CONTEXT if sequence.cut and sequence.finish == "length" else sequence.finish
        return Answer(
            id=sequence.request.id,
            text=text,
            tokens=tokens,
            finish=finish,
            prompt_tokens=0 if sequence.why else len(sequence.prompt),
            why=sequence.why,
        )


def _advance(sequence: Running, token: int) -> str:
    """Append a token, set ``finish`` if it is the last, and return the text that is certain now."""
    sequence.tokens.append(token)
    text, piece = sequence.text, ""
    if token in sequence.ends:
        sequence.finish = "eos"
    elif text is not None:
        piece = text.push(token)
        sequence.finish = "stop" if text.stopped else ""
    if not sequence.finish and len(sequence.tokens) >= sequence.request.sampling.max_new_tokens:
        sequence.finish = "length"
    if sequence.finish and text is not None:
        piece += text.close()
        if text.stopped:
            sequence.finish = "stop"
    return piece


def _pool_rows(lmm: Any, batch_tokens: int | None, kv_cache_bytes: int | None) -> int:
    """Rows of the pool. UserError if both sizes are given or nothing fits."""
    if kv_cache_bytes is None:
        rows, said = BATCH_TOKENS if batch_tokens is None else batch_tokens, f"batch_tokens is {batch_tokens}"
    elif batch_tokens is not None:
        raise UserError(
            f"batch_tokens={batch_tokens} and kv_cache_bytes={kv_cache_bytes} size one pool; give one of them"
        )
    else:
        one = row_bytes(lmm.num_kv_heads, lmm.head_dim, lmm.dtype)
        rows, said = kv_cache_bytes // one, f"kv_cache_bytes is {kv_cache_bytes}, a token takes {one}"
    if rows < 2:
        raise UserError(f"{said}; the K/V pool needs room for a prompt and its answer")
    return rows


def _has_window(config: Any) -> bool:
    """True if some layer attends only to the last tokens."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    return bool(getattr(config, "sliding_window", None))
