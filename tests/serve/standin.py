"""A live engine for the tests until the package has its own: one thread over Engine.add_request, step and abort."""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import types
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.types import IMAGE, Answer, Request, TokenLogprob


class QueueFullError(UserError):
    pass


class StoppedError(UserError):
    pass


@dataclass(frozen=True)
class Piece:
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]


@dataclass
class Stats:
    running: int = 0
    waiting: int = 0
    pool_rows: int = 0
    pool_used_rows: int = 0
    cache_hit_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    image_hits: int = 0
    image_misses: int = 0
    aborted: int = 0
    failed: int = 0


class Stream:
    def __init__(self, live: LiveEngine, name: str) -> None:
        self.live, self.name = live, name
        self.queue: queue.Queue[Piece | Answer] = queue.Queue()
        self.found: Answer | None = None

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while self.found is None:
            try:
                item = self.queue.get_nowait()
            except queue.Empty:
                await asyncio.sleep(0.001)
                continue
            if isinstance(item, Answer):
                self.found = item
            else:
                yield item

    async def answer(self) -> Answer:
        async for _ in self:
            pass
        assert self.found is not None
        return self.found

    def abort(self) -> None:
        self.live.post(("abort", self.name))


class LiveEngine:
    def __init__(self, engine: Engine, *, max_waiting: int = 256) -> None:
        self.engine, self.max_waiting = engine, max_waiting
        self.streams: dict[str, Stream] = {}
        self.inbox: queue.Queue = queue.Queue()
        self.counted = Stats(pool_rows=engine.batch_tokens)
        self.stopped = False
        self.thread = threading.Thread(target=self._loop, daemon=True)
        self.thread.start()

    def post(self, item: object) -> None:
        self.inbox.put(item)

    def submit(self, request: Request) -> Stream:
        if self.stopped:
            raise StoppedError("stopped")
        if len(self.streams) >= self.max_waiting:
            raise QueueFullError("full")
        messages = [
            {**m, "value": "".join("<image>" if p is IMAGE else p for p in m["value"])} for m in request.messages
        ]
        stream = self.streams[request.id] = Stream(self, request.id)
        self.post(replace(request, messages=messages))
        return stream

    def stats(self) -> Stats:
        return replace(self.counted, running=len(self.streams))

    def close(self, *, drain: float = 0.0) -> None:
        self.stopped = True
        self.post(None)
        self.thread.join()

    def _loop(self) -> None:
        while True:
            idle = not self.engine.unfinished
            try:
                item = self.inbox.get(block=idle)
            except queue.Empty:
                self._step()
                continue
            if item is None:
                return
            if isinstance(item, Request):
                stream = self.streams[item.id]
                self.engine.add_request(item, lambda _, text, s=stream: s.queue.put(Piece(text, (), ())))
            else:
                self.engine.abort(item[1])

    def _step(self) -> None:
        for answer in self.engine.step():
            self.counted.prompt_tokens += answer.prompt_tokens
            self.counted.generated_tokens += len(answer.tokens)
            self.counted.aborted += answer.finish == "aborted"
            self.streams.pop(answer.id).queue.put(answer)


def install() -> None:
    module = types.ModuleType("tinyllava_fast.infer.live")
    for item in (QueueFullError, StoppedError, Piece, Stats, Stream, LiveEngine):
        setattr(module, item.__name__, item)
    sys.modules[module.__name__] = module


if __name__ == "__main__":
    install()
    from tinyllava_fast.serve.cli import main

    sys.exit(main())
