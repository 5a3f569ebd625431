"""The inference engine: requests in, answers out, in whatever order they finish.

What is computed once: the tower per image, and the K/V of the tokens that all questions about an image share. What is
packed: all prefixes in one pass, all suffixes in one pass, then one token per running sequence per step. K/V live in
one preallocated pool that the registered attention function writes and reads; a sequence leaves the batch at its own
end, and the queue refills the pool as rows come free.

Legend: R sequences, T tokens of a pass, D hidden width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tinyllava_fast.data.images import ImageMode
from tinyllava_fast.data.templates.base import Template
from tinyllava_fast.data.tokenizer import largest_id
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.core import Core
from tinyllava_fast.infer.counters import Counters, Usage
from tinyllava_fast.infer.fast_model.positions import has_fixed_angles, has_window
from tinyllava_fast.infer.fast_model.prepare import PreparedModel
from tinyllava_fast.infer.fast_model.runner import PackedDecoder
from tinyllava_fast.infer.finish import CONTEXT, FAILED
from tinyllava_fast.infer.scheduling.images import ImageEncoder
from tinyllava_fast.infer.scheduling.pool import pool_rows
from tinyllava_fast.infer.scheduling.prompts import Preparer, Prompts, prepare
from tinyllava_fast.infer.scheduling.scheduler import Limits, Scheduler
from tinyllava_fast.infer.scheduling.sequence import OnToken, Sequence
from tinyllava_fast.infer.scoring import Collector
from tinyllava_fast.infer.types import Answer, Request, Scores
from tinyllava_fast.models.build import check_vocabulary
from tinyllava_fast.models.lmm import LMM


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
    threads: image decoders. reuse: whether requests that come one by one start from the K/V of earlier ones that begin
        alike. image_cache_bytes: features of images kept for them; None: of 256, in at most 256 MB. chunk_tokens:
        tokens of a prompt that are computed between two steps of decoding; None: as many as take as long as a step.
    compile: the decode step; True, False, or None: when it pays (compiled_step.py).
    speculate: most tokens that are guessed and verified in one step of a greedy sequence; 0: none (speculation.py).
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
        reuse: bool = True,
        image_cache_bytes: int | None = None,
        chunk_tokens: int | None = None,
        compile: bool | None = None,
        speculate: int = 0,
        source: str | Path = "",
    ) -> None:
        self.model = PreparedModel(model) if isinstance(model, LMM) else model
        self.lmm = lmm = self.model.lmm
        self.source = str(source) or type(lmm.llm).__name__
        self.tokenizer = tokenizer
        self.processor = processor
        self.template = template
        self.batch_tokens = pool_rows(lmm, batch_tokens, kv_cache_bytes)
        self.lookahead = lookahead
        config = lmm.llm.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.eos = lmm.family.stop_ids(lmm.llm) | {template.stop_id(tokenizer)}
        check_vocabulary(lmm, tokenizer)
        self.vocab = largest_id(tokenizer)[1] + 1
        # A window hides keys by distance, which a prefix shared between sequences has no single value of.
        self.share_prefix = not has_window(config)
        self._images = ImageEncoder(
            lmm, processor, mode=image_mode, grid=image_grid, threads=threads, cache_bytes=image_cache_bytes
        )
        self._decoder = PackedDecoder(self.model, self.batch_tokens, share_prefix=self.share_prefix, compile=compile)
        self.adapters = self._decoder.adapters
        limits = self.context, self.batch_tokens
        self._prompts = Prompts(
            template, tokenizer, self._images.rows, *limits, self.eos, ahead=lookahead, adapters=self.adapters
        )
        scheduler = Scheduler(
            self._decoder.pool,
            Limits(prefill_tokens),
            window=lookahead,
            max_group_rows=self.batch_tokens // 2,
            share_prefix=self.share_prefix,
            reuse=reuse and has_fixed_angles(config),
            chunk_tokens=chunk_tokens,
        )
        core = self.model, self._images, self._decoder, scheduler
        self._core = Core(*core, vocab=self.vocab, source=self.source, speculate=speculate)
        self._counters = Counters()
        self._inboxes: dict[Sequence, deque[Sequence]] = {}  # where each sequence in flight goes when it has ended
        self._added: dict[str, Sequence] = {}  # of add_request, until step has returned their answers
        self._answered: deque[Sequence] = deque()  # those of them that have ended

    @property
    def counters(self) -> Counters:
        """Return what has been done so far."""
        return replace(
            self._counters,
            images_encoded=self._images.encoded,
            images_reused=self._images.hits,
            computed_tokens=self._decoder.computed_tokens,
            generated_tokens=self._core.generated_tokens,
            decode_steps=self._decoder.steps,
            guessed_tokens=self._core.speculation.guessed,
            right_guesses=self._core.speculation.right,
        )

    @property
    def usage(self) -> Usage:
        """Return what is in flight."""
        scheduler, rows = self._core.scheduler, self._decoder.pool.rows
        kept = scheduler.prefixes.num_rows
        return Usage(scheduler.num_running, scheduler.num_waiting, self.batch_tokens, rows.free_rows, kept)

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the K/V pool."""
        return self._decoder.pool.nbytes

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Let requests name a LoRA adapter; others are answered as before, in the same passes.

        folder: as peft writes it, with the layer names of this toolkit's model folders, or such a folder that has one
        in it. UserError for a name that is taken. CheckpointError for a folder that is damaged, not of this model, no
        plain LoRA, or that changes more than the language model's linear layers.
        """
        self.adapters.add(name, self.adapters.read(folder))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. UserError if there is none of that name, or requests in flight use it."""
        number = self.adapters.number(name)
        if users := sum(s.adapter == number for s in self._inboxes):
            raise UserError(
                f"adapter {name!r}: {users} requests in flight use it; wait for their answers, or abort them"
            )
        self.adapters.remove(name)

    def take_memory(self) -> None:
        """Take the memory of the K/V pool and of images' features now, before the first request, not as they fill."""
        self._decoder.pool.take_memory()
        self._images.take_memory()

    def add_request(self, request: Request, on_token: OnToken | None = None) -> None:
        """Take in a request beside those that run; ``step`` computes and returns its answer.

        on_token: as for ``run``. A request that cannot be put to the model, or not with the memory of the engine, costs
        nobody else anything: see Answer.finish. UserError for an id that is missing, or that an unfinished request has.
        """
        self.add(prepare(self._prompts, self._images, request, on_token))

    def add(self, sequence: Sequence) -> None:
        """Take in a request that ``preparer`` has made a sequence of; otherwise as ``add_request``."""
        name = sequence.request.id
        if not name or name in self._added:
            raise UserError(f"request id {name!r}: expected one that no unfinished request has; name another")
        self._added[name] = sequence
        self._take([sequence], self._answered)

    def preparer(self) -> Preparer:
        """Return what reads a request's images and makes tokens of its text, for one thread of its own.

        Both take time in which the thread that calls ``step`` can go on. It has its own copy of the tokenizer. A
        request that cannot be put to the model comes back as a sequence that has failed.
        """
        prompts = replace(self._prompts, tokenizer=copy.deepcopy(self.tokenizer), decoder=self.tokenizer)
        return Preparer(prompts, self._images)

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
        answers = []
        for sequence in ended:
            try:
                answers.append(self._answer(sequence))
            except Exception as error:  # a fault of ours must cost no other its answer
                sequence.fail(error)
                answers.append(self._answer(sequence))
            del self._added[sequence.request.id]
        self._forget_if_idle()
        return answers

    def fail(self, error: BaseException) -> None:
        """End all requests of ``add_request`` with an error, after a ``step`` that raised it and ended none."""
        for sequence in self._added.values():
            self._core.scheduler.fail(sequence, error)

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

    def answer(self, request: Request, on_token: OnToken | None = None) -> Answer:
        """Answer one request, beginning with the K/V and the features of images that earlier ones left.

        Arguments and errors as for ``run``.
        """
        sequence = prepare(self._prompts, self._images, request, on_token, truncate=False)
        (ended,) = self._through(iter([sequence]))
        if ended.error is not None:
            raise ended.error
        return self._answer(ended)

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
        """Score each option as the answer to its request; yield a question when all its options are done.

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
            self._forget_if_idle()

    def _take(self, sequences: Iterable[Sequence], inbox: deque[Sequence]) -> None:
        """Hand sequences to the core; each comes to the inbox when it has ended."""
        for sequence in sequences:
            self._inboxes[sequence] = inbox
            if not self.adapters.has(sequence.adapter) and not sequence.ended:  # while the prompt was made
                sequence.fail(UserError(f"{sequence.request.named}: its adapter was unloaded; load it again"))
            self._core.scheduler.add(sequence)

    def _deliver(self, ended: Iterable[Sequence]) -> None:
        for sequence in ended:
            self._inboxes.pop(sequence).append(sequence)

    def _forget_if_idle(self) -> None:
        """Drop the features of images that are not decoded once nothing is in flight: the files may change."""
        if self._core.scheduler.idle:
            self._images.forget()

    def _count(self, sequence: Sequence) -> None:
        self._counters.requests += 1
        self._counters.prompt_tokens += len(sequence.prompt)
        self._counters.reused_tokens += sequence.num_reused_tokens

    def _answer(self, sequence: Sequence) -> Answer:
        tokens, failed = sequence.tokens, sequence.error is not None
        # Not every tokenizer counts the end token of its chat template as a special one.
        said = tokens[:-1] if tokens and tokens[-1] in sequence.stop_ids else tokens
        if failed:
            text = ""
        elif sequence.text is not None:
            text = sequence.text.text
        else:
            text = str(self.tokenizer.decode(said, skip_special_tokens=True)).strip()
        self._count(sequence)
        return Answer(
            id=sequence.request.id,
            text=text,
            tokens=[] if failed else tokens,
            finish=CONTEXT if sequence.truncated and sequence.finish == "length" else sequence.finish,
            prompt_tokens=0 if failed else len(sequence.prompt),
            cached_tokens=sequence.num_reused_tokens,
            logprobs=[] if failed else sequence.logprobs,
            why=(str(sequence.error) or type(sequence.error).__name__) if failed else "",
        )
