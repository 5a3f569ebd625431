"""The answers of the engine as they come: several choices of one request in one flow, given up when nobody reads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from fastapi import Request

from tinyllava_fast.infer.live import Piece, QueueFullError, StoppedError, Stream
from tinyllava_fast.infer.types import Answer
from tinyllava_fast.infer.types import Request as Question
from tinyllava_fast.serve.metrics import Clock, Metrics
from tinyllava_fast.serve.problems import ClientGoneError, busy
from tinyllava_fast.serve.served import Served

Result = TypeVar("Result")
Event = tuple[int, Piece | Answer | BaseException]  # with the index of a choice


class Choices:
    """The answers to some questions, all of which are taken in at once or none. ApiError 429 if the queue is full."""

    def __init__(self, served: Served, questions: Sequence[Question], metrics: Metrics) -> None:
        self.served, self.metrics = served, metrics
        self.answers: list[Answer | None] = [None] * len(questions)
        self.streams: list[Stream] = []
        try:
            for question in questions:
                self.streams.append(served.live.submit(question))
        except (QueueFullError, StoppedError) as error:
            self.abort()
            if isinstance(error, QueueFullError):
                raise busy("too many requests wait; try again", status=429) from None
            raise busy("the server is stopping") from None

    async def events(self) -> AsyncGenerator[tuple[int, Piece | Answer], None]:
        """Yield (index of the choice, its next piece of text or at last its answer). Left early, all are aborted."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(index, queue)) for index in range(len(self.streams))]
        left = len(tasks)
        try:
            while left:
                waiting = [await queue.get()]
                while not queue.empty():
                    waiting.append(queue.get_nowait())
                for index, event in joined(waiting):
                    if isinstance(event, BaseException):
                        raise event
                    if isinstance(event, Answer):
                        self.answers[index], left = event, left - 1
                    yield index, event
        finally:
            self.abort()
            for task in tasks:
                task.cancel()

    def abort(self) -> None:
        """Give up what is not answered yet."""
        for stream, answer in zip(self.streams, self.answers, strict=False):
            if answer is None:
                stream.abort()

    async def _pump(self, index: int, queue: asyncio.Queue[Event]) -> None:
        clock, stream = Clock(self.metrics, self.served.name), self.streams[index]
        try:
            async for piece in stream:
                clock.piece()
                await queue.put((index, piece))
            answer = await stream.answer()
            clock.end()
            await queue.put((index, answer))
        except Exception as error:
            await queue.put((index, error))


class OneByOne:
    """Work that takes the cores for seconds or minutes, in a thread, one piece at a time."""

    MOST = 4

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._waiting = 0

    def check_room(self) -> None:
        """Raise ApiError 429 if too many wait."""
        if self._waiting >= self.MOST:
            raise busy("too many looks wait; try again", status=429)

    async def run(self, work: Callable[[Callable[[], None]], Result]) -> Result:
        """Return the result of ``work``. ApiError 429 if too many wait.

        work: is given a function to call now and then; it raises ClientGoneError once the client has hung up.
        """
        self.check_room()
        gone = threading.Event()

        def check_client() -> None:
            if gone.is_set():
                raise ClientGoneError

        self._waiting += 1
        try:
            async with self._lock:
                thread = asyncio.ensure_future(asyncio.to_thread(work, check_client))
                try:
                    return await asyncio.shield(thread)
                except asyncio.CancelledError:
                    gone.set()
                    await asyncio.wait({thread})  # the next one must not run beside it
                    thread.exception()  # nobody else asks for it
                    raise
        finally:
            self._waiting -= 1


def joined(events: Iterable[Event]) -> Iterator[Event]:
    """Yield events with the pieces of a choice that wait together as one: who falls behind sends fewer, larger chunks.

    >>> [(index, piece.text) for index, piece in joined([(0, Piece("a", (1,))), (0, Piece("b", (2,)))])]
    [(0, 'ab')]
    """
    pieces: dict[int, Piece] = {}
    for index, event in events:
        if isinstance(event, Piece):
            before = pieces.get(index)
            pieces[index] = event if before is None else _both(before, event)
            continue
        if index in pieces:
            yield index, pieces.pop(index)
        yield index, event
    yield from pieces.items()


def _both(one: Piece, other: Piece) -> Piece:
    return Piece(one.text + other.text, one.tokens + other.tokens, one.logprobs + other.logprobs)


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of ``work``, which is cancelled when the client hangs up: ClientGoneError.

    The body of the request must have been read.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
