"""The process: connections that cannot be held open for nothing, and an end that finishes what runs."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinyllava_fast.errors import UserError
from tinyllava_fast.hardware import release_memory
from tinyllava_fast.log import log
from tinyllava_fast.serve.auth import Guard
from tinyllava_fast.serve.limits import ServerLimits

REST_SECONDS = 1  # for the rest of a body that was answered before its end
RELEASE_TICKS = 100  # uvicorn has ten a second


def protocol(limits: ServerLimits) -> type[H11Protocol]:
    """Return uvicorn's protocol with time limits for a request's head and for a client that does not read.

    Of more connections than there may be the oldest one without a request is closed.
    """

    idle: dict[Limited, None] = {}  # oldest first

    class Limited(H11Protocol):
        """A connection of one client."""

        _head: asyncio.TimerHandle | None = None
        _stuck: asyncio.TimerHandle | None = None
        _rest: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Also close the oldest idle connection if there are too many."""
            super().connection_made(transport)
            idle[self] = None
            if len(self.connections) > limits.connections:
                oldest = next(iter(idle))
                del idle[oldest]
                oldest.transport.abort()
            self._watch_head()

        def connection_lost(self, exc: Exception | None) -> None:
            """See the base class."""
            idle.pop(self, None)
            _stop(self._head, self._stuck, self._rest)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """See the base class."""
            super().data_received(data)
            self._watch_head()

        def on_response_complete(self) -> None:
            """Also see to a body whose rest nobody will read."""
            super().on_response_complete()
            if self.conn.their_state is h11.SEND_BODY:  # a client that is cut off while it sends sees no answer
                self._rest = self.loop.call_later(REST_SECONDS, self.transport.abort)
            self._watch_head()

        def pause_writing(self) -> None:
            """The client takes nothing: give it some time."""
            super().pause_writing()
            _stop(self._stuck)
            self._stuck = self.loop.call_later(limits.client_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            """See the base class."""
            super().resume_writing()
            _stop(self._stuck)

        def _watch_head(self) -> None:
            """Note whether the head of a request is being waited for, and see that it does not take for ever."""
            if self.conn.their_state is not h11.SEND_BODY:
                _stop(self._rest)
            if self.conn.their_state is not h11.IDLE:
                _stop(self._head)
                self._head = None
                idle.pop(self, None)
            elif self._head is None:
                idle[self] = None
                self._head = self.loop.call_later(limits.client_seconds, self.transport.abort)

    return Limited


def _stop(*timers: asyncio.TimerHandle | None) -> None:
    for timer in timers:
        if timer is not None:
            timer.cancel()


class Server(uvicorn.Server):
    """Uvicorn's server that, told to end, refuses new requests, finishes those that run, and returns."""

    def __init__(self, guard: Guard, limits: ServerLimits) -> None:
        super().__init__(
            uvicorn.Config(
                guard,
                http=protocol(limits),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=int(limits.client_seconds),
                timeout_graceful_shutdown=5,
            )
        )
        self.guard = guard
        self.limits = limits
        self._leaving: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn raises the signal again at the end; here the process ends as one that has done its work."""
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            numbers.append(signal.SIGHUP)  # the terminal has been closed
        for number in numbers:
            loop.add_signal_handler(number, self.leave)
        yield

    async def on_tick(self, counter: int) -> bool:
        """Also give back, from time to time, the free memory between blocks that stay: it would grow with each pass."""
        if counter % RELEASE_TICKS == 0:
            await asyncio.to_thread(release_memory)
        return await super().on_tick(counter)

    def leave(self) -> None:
        """Begin to end; called again, end at once."""
        if self._leaving is not None:
            self.should_exit = self.force_exit = True
            return
        log.info("stopping: %d requests are being answered", self.guard.active)
        self.guard.draining = True
        self._leaving = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        deadline = asyncio.get_running_loop().time() + self.limits.drain_seconds
        while self.guard.active and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        self.should_exit = True


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that does not listen yet. UserError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except (OSError, OverflowError, UnicodeError) as error:
        made.close()
        raise UserError(f"--host {host} --port {port}: {error}; name another one") from None
    return made


def listen(made: socket.socket) -> None:
    """Let clients connect. UserError if another program has begun to since the address was taken."""
    try:
        made.listen(2048)
    except OSError as error:
        raise UserError(f"--port {made.getsockname()[1]}: {error}; name another one") from None
