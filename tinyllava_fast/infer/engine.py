"""The inference engine: requests in, answers out, in whatever order they finish.

What is computed once: the tower per image, and the K/V of the tokens that all questions about an image share. What is
packed: all prefixes in one pass, all suffixes in one pass, then one token per running sequence per step. K/V live in
one preallocated pool that the registered attention function writes and reads; a sequence leaves the batch at its own
end, and the queue refills the pool as rows come free.

Legend: R sequences, T tokens of a pass, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tinyllava_fast.data.images import ImageMode
from tinyllava_fast.data.templates.base import Template
from tinyllava_fast.data.tokenizer import largest_id
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.core import Core
from tinyllava_fast.infer.fast_model.prepare import PreparedModel
from tinyllava_fast.infer.fast_model.runner import PackedDecoder
from tinyllava_fast.infer.finish import CONTEXT, FAILED
from tinyllava_fast.infer.scheduling.images import ImageEncoder
from tinyllava_fast.infer.scheduling.pool import row_bytes
from tinyllava_fast.infer.scheduling.prompts import Prompts
from tinyllava_fast.infer.scheduling.scheduler import Limits, Scheduler
from tinyllava_fast.infer.scheduling.sequence import OnToken, Sequence
from tinyllava_fast.infer.scoring import Collector
from tinyllava_fast.infer.types import Answer, Request, Scores
from tinyllava_fast.models.build import check_vocabulary
from tinyllava_fast.models.lmm import LMM

BATCH_TOKENS = 16384


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
        tokenizer: PreTrainedTokenizerBase,
        processor: Any,
        template: Template,
        *,
        image_mode: ImageMode = "square",
        image_grid: Items[tuple[int, int]] = (),
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
        scheduler = Scheduler(
            self._decoder.pool,
            Limits(prefill_tokens),
            window=lookahead,
            max_group_rows=self.batch_tokens // 2,
            share_prefix=self.share_prefix,
        )
        self._core = Core(self.model, self._images, self._decoder, scheduler, vocab=self.vocab, source=self.source)
        self._counters = Counters()
        self._inboxes: dict[Sequence, deque[Sequence]] = {}  # where each sequence in flight goes when it has ended
        self._added: dict[str, Sequence] = {}  # of add_request, until step has returned their answers
        self._answered: deque[Sequence] = deque()  # those of them that have ended

    @property
    def counters(self) -> Counters:
        """What has been done so far."""
        return replace(
            self._counters,
            images_encoded=self._images.encoded,
            computed_tokens=self._decoder.computed_tokens,
            generated_tokens=self._core.generated_tokens,
            decode_steps=self._decoder.steps,
        )

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the K/V pool."""
        return self._decoder.pool.nbytes

    def add_request(self, request: Request, on_token: OnToken | None = None) -> None:
        """Take in a request beside those that run; ``step`` computes and returns its answer.

        on_token: as for ``run``. A request that cannot be put to the model, or not with the memory of the engine, costs
        nobody else anything: see Answer.finish. UserError for an id that is missing, or that an unfinished request has.
        """
        if not request.id or request.id in self._added:
            raise UserError(f"request id {request.id!r}: expected one that no unfinished request has; name another")
        (sequence,) = self._prompts.sequences([request], on_token, truncate=True)
        self._added[request.id] = sequence
        self._take([sequence], self._answered)

    def abort(self, request_id: str) -> bool:
        """End a request of ``add_request``. Return False if there is none of that id.

        The next ``step`` frees its rows and returns the answer as far as it has come, with finish "aborted".
        """
        sequence = self._added.get(request_id)
        if sequence is not None:
            self._core.scheduler.abort(sequence)
        return sequence is not None

    def step(self) -> list[Answer]:
        """Do one pass, a prefill or one token for each running sequence; return the answers that are complete.

        Every request of ``add_request`` is answered once, be it by its error. Requests may be added and aborted between
        steps, and aborted by ``on_token``; all by the thread that calls ``step``.
        Raises CheckpointError if the model's numbers are not finite; the requests of that pass have failed then.
        """
        if not self._answered:
            self._deliver(self._core.step())
        ended = list(self._answered)
        self._answered.clear()
        for sequence in ended:
            del self._added[sequence.request.id]
        self._forget_if_idle()
        return [self._answer(sequence) for sequence in ended]

    @property
    def unfinished(self) -> int:
        """Requests of ``add_request`` that ``step`` has not answered yet."""
        return len(self._added)

    def run(
        self, requests: Iterable[Request], on_token: OnToken | None = None, *, keep_going: bool = False
    ) -> Iterator[Answer]:
        """Yield one answer per request as it finishes. The queue is read lazily, ``lookahead`` requests at a time.

        on_token: called with a request's id and the next piece of its text, whole characters only, as soon as it is
        certain; the pieces of a request add up to its answer's text.
        Raises UserError, naming the request, for image markers that do not match its images or a prompt that does not
        fit the model's context or the pool, and DataError for an unreadable image. keep_going: what is wrong with one
        request costs that request alone: see Answer.finish. A prompt that the context has room for but the pool has not
        still raises, and so does a model whose numbers are not finite (CheckpointError).
        """
        for sequence in self._through(self._prompts.sequences(requests, on_token, truncate=keep_going)):
            if sequence.error is not None and not (keep_going and sequence.finish != FAILED):
                raise sequence.error
            yield self._answer(sequence)

    def surely_fits(self, request: Request) -> bool:
        """Return whether a request is so short that ``refusals`` cannot find it too long. Costs no tokenizing."""
        return self._prompts.surely_fits(request)

    def refusals(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """The empty answers of ``run`` with keep_going to prompts that cannot be put to the model, without running any.

        Raises UserError for a prompt that does not fit the pool. Images are not decoded, so unreadable ones are found
        here only where a prompt's length depends on their size.
        """
        for sequence in self._prompts.sequences(requests, truncate=True):
            if sequence.error is not None:
                if sequence.finish == FAILED:
                    raise sequence.error
                yield self._answer(sequence)

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

    def score(self, questions: Iterable[tuple[Request, Items[str]]]) -> Iterator[Scores]:
        """How probable each option is as the answer to its request; yields a question when all its options are done.

        The tower runs once per image, the K/V of what the prompts about an image share are computed once, and all
        options are packed behind them; nothing is generated, and the requests' ``sampling`` has no effect.
        UserError for a question without options, and as for ``run``.
        """
        collector = Collector()
        sequences = self._prompts.scored(collector.watch(questions))
        for sequence in self._through(collector.register(sequences)):
            if sequence.error is not None:
                raise sequence.error
            done = collector.add(sequence)
            if done is not None:
                self._count(sequence)
                yield done

    def _through(self, source: Iterator[Sequence]) -> Iterator[Sequence]:
        """Yield sequences as they end, reading them as there is room for them. Those that are left are aborted."""
        ended: deque[Sequence] = deque()
        scheduler, left, more = self._core.scheduler, 0, True
        try:
            while True:
                while more and scheduler.wants_more():
                    some = list(islice(source, self.lookahead))
                    self._take(some, ended)
                    left, more = left + len(some), bool(some)
                if not left and not more:
                    return
                self._deliver(self._core.step())
                while ended:
                    left -= 1
                    yield ended.popleft()
        finally:
            unread = [s for s, inbox in self._inboxes.items() if inbox is ended]
            for sequence in unread:
                scheduler.abort(sequence)
            self._deliver(scheduler.collect())
            for sequence in unread:
                self._inboxes.pop(sequence, None)
            if self._forget_if_idle():
                scheduler.reset()

    def _take(self, sequences: Iterable[Sequence], inbox: deque[Sequence]) -> None:
        """Hand sequences to the core; each comes to the inbox when it has ended."""
        for sequence in sequences:
            self._inboxes[sequence] = inbox
            self._core.scheduler.add(sequence)

    def _deliver(self, ended: Iterable[Sequence]) -> None:
        for sequence in ended:
            self._inboxes.pop(sequence).append(sequence)

    def _forget_if_idle(self) -> bool:
        """Drop the features of images once nothing is in flight: the files may change."""
        idle = self._core.scheduler.idle
        if idle:
            self._images.forget()
        return idle

    def _count(self, sequence: Sequence) -> None:
        self._counters.requests += 1
        self._counters.prompt_tokens += len(sequence.prompt)

    def _answer(self, sequence: Sequence) -> Answer:
        self._count(sequence)
        tokens, failed = sequence.tokens, sequence.error is not None
        # Not every tokenizer counts the end token of its chat template as a special one.
        said = tokens[:-1] if tokens and tokens[-1] in sequence.stop_ids else tokens
        if sequence.text is not None:
            text = sequence.text.text
        else:
            text = str(self.tokenizer.decode(said, skip_special_tokens=True)).strip()
        return Answer(
            id=sequence.request.id,
            text="" if failed else text,
            tokens=[] if failed else tokens,
            finish=CONTEXT if sequence.truncated and sequence.finish == "length" else sequence.finish,
            prompt_tokens=0 if failed else len(sequence.prompt),
            logprobs=[] if failed else sequence.logprobs,
            why=(str(sequence.error) or type(sequence.error).__name__) if failed else "",
        )


def _pool_rows(lmm: LMM, batch_tokens: int | None, kv_cache_bytes: int | None) -> int:
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


def _has_window(config: PreTrainedConfig) -> bool:
    """True if some layer attends only to the last tokens."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    return bool(getattr(config, "sliding_window", None))
