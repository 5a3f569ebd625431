"""An engine in a thread of its own: requests come from any thread or event loop, answers stream back.

One thread owns the model and calls ``Engine.step``. A second one reads images and makes tokens, which can take longer
than a step, so nobody's next token waits for it. Callers hand in requests and read streams; they never touch the
engine.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.finish import ABORTED, FAILED
from tinyllava_fast.infer.scheduling.sequence import Sequence
from tinyllava_fast.infer.types import Answer, Request, TokenLogprob
from tinyllava_fast.log import log, place_of


class QueueFullError(UserError):
    """So many requests wait that another one would wait too long."""


class StoppedError(UserError):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Piece:
    """The part of an answer that has come since the last piece.

    text: whole characters only, nothing of a stop text. logprobs: one a token, if the request asked for them.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Stats:
    """The load of an engine, and its work so far.

    waiting: requests that have no rows of the K/V pool yet. running: those that have. pool_used_rows: rows that running
    requests hold; pool_kept_rows: those kept for prompts that begin alike.
    """

    running: int
    waiting: int
    pool_rows: int
    pool_used_rows: int
    pool_kept_rows: int
    requests: int
    aborted: int
    failed: int
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    images_encoded: int
    images_reused: int


class Stream:
    """The answer to one request while it grows. Read it as an iterator of pieces, in a thread or an event loop."""

    def __init__(self, request: Request, name: str, abort: Callable[[str], None]) -> None:
        """name: what the engine calls the request. abort: takes it."""
        self.request = request
        self.name = name
        self.aborted = False
        self._abort = abort
        self._pieces: deque[Piece] = deque()
        self._answer: Answer | None = None
        self._changed = threading.Condition()
        self._wakers: list[Callable[[], None]] = []  # of event loops that wait

    def __iter__(self) -> Iterator[Piece]:
        """Yield pieces until the answer is complete."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pieces or self._answer is not None)
                pieces = self._taken()
            if not pieces:
                return
            yield from pieces

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Yield pieces until the answer is complete."""
        while pieces := await self._more():
            for piece in pieces:
                yield piece

    def result(self, timeout: float | None = None) -> Answer:
        """Return the whole answer. TimeoutError if it takes longer than so many seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._answer is not None, timeout):
                raise TimeoutError(f"{self.request.named}: no answer within {timeout} s")
        assert self._answer is not None  # noqa: S101 waited for
        return self._answer

    async def answer(self) -> Answer:
        """Return the whole answer."""
        while self._answer is None:
            await self._wake(lambda: self._answer is not None)
        return self._answer

    def abort(self) -> None:
        """End the request within a step; its answer is what has come until then, with finish "aborted".

        The request's images are dropped at once: it may be in a queue still.
        """
        self.aborted = True
        self.request = replace(self.request, image=None)
        self._abort(self.name)

    def put(self, piece: Piece | None, answer: Answer | None = None) -> None:
        """Add what has come, in the engine's thread. answer: the complete one, after the last piece."""
        with self._changed:
            if piece is not None:
                self._pieces.append(piece)
            self._answer = answer
            self._changed.notify_all()
            wakers, self._wakers = self._wakers, []
        for wake in wakers:
            wake()

    def _taken(self) -> list[Piece]:
        pieces = list(self._pieces)
        self._pieces.clear()
        return pieces

    async def _more(self) -> list[Piece]:
        await self._wake(lambda: bool(self._pieces) or self._answer is not None)
        with self._changed:
            return self._taken()

    async def _wake(self, ready: Callable[[], bool]) -> None:
        """Wait in an event loop until the stream is ready."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the loop has been closed, and nobody waits
                pass

        with self._changed:
            if ready():
                return
            self._wakers.append(wake)
        try:
            await event.wait()
        finally:
            with self._changed:
                if wake in self._wakers:
                    self._wakers.remove(wake)


@dataclass
class _Open:
    """A request in the engine: its stream, and what has come since the last piece."""

    stream: Stream
    sequence: Sequence
    text: str = ""
    told: int = 0  # tokens in pieces


class LiveEngine:
    """Runs an engine in a thread. Every method may be called from any thread.

    max_waiting: requests that may wait for rows of the K/V pool; more are refused. The engine must not be used by
    others until ``close`` has returned.
    """

    def __init__(self, engine: Engine, *, max_waiting: int = 256) -> None:
        self.engine = engine
        self.max_waiting = max_waiting
        self._numbers = count()
        self._preparing: dict[str, Stream] = {}  # those that are no sequences yet
        self._aborted = self._failed = 0
        self._open: dict[str, _Open] = {}
        self._inbox: deque[Callable[[], object]] = deque()  # what the engine's thread has to do
        self._news = threading.Condition()
        self._closing = self._stopping = False
        engine.take_memory()
        self._prepare = engine.preparer()
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="tlf-prepare")
        self._stats = self._look()
        self._thread = threading.Thread(target=self._run, name="tlf-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Stream:
        """Hand in a request, whatever its id, and return its answer's stream at once.

        What is wrong with the request is told by its answer: see Answer.finish and Answer.why.
        Raises QueueFullError if ``max_waiting`` requests wait, StoppedError after ``close``.
        """
        with self._news:
            if self._closing:
                raise StoppedError("the engine is shutting down and takes no more requests")
            if len(self._preparing) + self._stats.waiting >= self.max_waiting:
                raise QueueFullError(f"{self.max_waiting} requests wait already; try again later")
            name = f"{request.id or 'request'} {next(self._numbers)}"
            self._preparing[name] = stream = Stream(request, name, self._abort)
            self._preparer.submit(self._ready, stream)
        return stream

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Let requests name a LoRA adapter while others run: ``Engine.load_adapter``. StoppedError after ``close``."""
        updates = self.engine.adapters.read(folder)
        self._call(lambda: self.engine.adapters.add(name, updates))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter: ``Engine.unload_adapter``. StoppedError after ``close``."""
        self._call(lambda: self.engine.unload_adapter(name))

    def warm_up(self) -> None:
        """Do now what the first request of some kind would wait for, and others behind it."""
        self._preparer.submit(self._prepare.warm_up).result()

    async def literal_ids(self, text: str) -> list[int]:
        """Return the ids of a text without a chat template, in which no control token is anything but text.

        Raises what the tokenizer says against the text.
        """
        return await asyncio.wrap_future(self._preparer.submit(self._prepare.literal_ids, text))

    def stats(self) -> Stats:
        """Return the numbers of the last step."""
        with self._news:
            return replace(self._stats, waiting=self._stats.waiting + len(self._preparing))

    def close(self, *, drain: float = 0.0) -> None:
        """Refuse new requests, let the others finish for so many seconds, abort the rest and end the threads."""
        with self._news:
            self._closing = True
        until = time.monotonic() + drain
        while time.monotonic() < until and (self._preparing or self._open):
            time.sleep(0.01)
        with self._news:
            queued = list(self._preparing.values())
        for stream in queued:  # whose images need not be read any more
            stream.abort()
        self._preparer.shutdown()
        with self._news:
            self._stopping = True
            self._news.notify()
        self._thread.join()

    def _ready(self, stream: Stream) -> None:
        """Make a sequence of a request, in the preparing thread."""
        request = replace(stream.request, id=stream.name)
        try:
            sequence = Sequence(request, []) if stream.aborted else self._prepare(request, self._on_text)
        except Exception as error:  # a fault of ours must not cost the thread
            log.error("a request could not be prepared: %s", place_of(error))
            sequence = Sequence(request, [])
            sequence.fail(error)
        self._do(lambda: self._enter(stream, sequence))

    def _enter(self, stream: Stream, sequence: Sequence) -> None:
        if stream.aborted and not sequence.ended:
            sequence.abort()
        self._open[stream.name] = _Open(stream, sequence)
        self.engine.add(sequence)
        with self._news:  # at any time it is counted once: as one that is prepared or as one that waits
            del self._preparing[stream.name]
            self._stats = self._look()

    def _abort(self, name: str) -> None:
        self._do(lambda: self.engine.abort(name))

    def _on_text(self, name: str, piece: str) -> None:
        self._open[name].text += piece

    def _do(self, work: Callable[[], object]) -> None:
        with self._news:
            self._inbox.append(work)
            self._news.notify()

    def _call(self, work: Callable[[], None]) -> None:
        """Do something between two steps, and return or raise what comes of it."""
        done: Future[None] = Future()

        def do() -> None:
            try:
                work()
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

        with self._news:
            if self._closing:
                raise StoppedError("the engine is shutting down; open another one")
            self._inbox.append(do)
            self._news.notify()
        done.result()

    def _run(self) -> None:
        """Do what callers want, then a step, then tell them, for as long as the engine lives."""
        while True:
            with self._news:
                while not (self._inbox or self._open or self._stopping):
                    self._news.wait()
                work, stopping = self._inbox, self._stopping
                self._inbox = deque()
            while work:
                work.popleft()()  # nothing here holds the last one's pictures while nobody asks
            if stopping:
                for name in self._open:
                    self.engine.abort(name)
            answers = self._step()
            self._aborted += sum(answer.finish == ABORTED for answer in answers)
            self._failed += sum(bool(answer.why) for answer in answers)
            self._stats = self._look()  # before anybody is told, who may ask for them
            self._tell(answers)
            if stopping and not self._open:
                return

    def _step(self) -> list[Answer]:
        """Return the answers of a step. One that fails ends a request at least, so that it is not tried for ever."""
        going = sum(not one.sequence.ended for one in self._open.values())
        try:
            answers = self.engine.step()
        except Exception as error:  # the requests of a pass have failed with it; the next step returns them
            log.error("a step of the engine failed: %s", place_of(error))
            if not going:  # and so did the step that should have returned what has ended
                return [_failed(name, error) for name in self._open]
            if going == sum(not one.sequence.ended for one in self._open.values()):  # it was no pass that failed
                self.engine.fail(error)
            return []
        return [answer for answer in answers if answer.id in self._open]  # the others were told of such a failure

    def _tell(self, answers: list[Answer]) -> None:
        """Put pieces and complete answers into their streams."""
        for one in self._open.values():
            tokens = one.sequence.tokens
            if len(tokens) > one.told and not one.sequence.ended:
                one.stream.put(self._piece(one))
        for answer in answers:
            one = self._open.pop(answer.id)
            own = replace(answer, id=one.stream.request.id)
            one.stream.put(self._piece(one) if answer.tokens[one.told :] or one.text else None, own)

    def _piece(self, one: _Open) -> Piece:
        sequence = one.sequence
        piece = Piece(one.text, tuple(sequence.tokens[one.told :]), tuple(sequence.logprobs[one.told :]))
        one.text, one.told = "", len(one.sequence.tokens)
        return piece

    def _look(self) -> Stats:
        counters, use = self.engine.counters, self.engine.usage
        return Stats(
            running=use.running,
            waiting=use.waiting,
            pool_rows=use.rows,
            pool_used_rows=use.rows - use.free_rows - use.kept_rows,
            pool_kept_rows=use.kept_rows,
            requests=counters.requests,
            aborted=self._aborted,
            failed=self._failed,
            prompt_tokens=counters.prompt_tokens,
            reused_tokens=counters.reused_tokens,
            generated_tokens=counters.generated_tokens,
            images_encoded=counters.images_encoded,
            images_reused=counters.images_reused,
        )


def _failed(name: str, error: Exception) -> Answer:
    why = str(error) or type(error).__name__
    return Answer(id=name, text="", tokens=[], finish=FAILED, prompt_tokens=0, why=why)
