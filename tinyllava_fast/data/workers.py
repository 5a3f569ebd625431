"""Processes beside this one that do the work of data: they end with it, and leave signals to it."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, Generic, TypeVar

from tinyllava_fast.errors import UserError

_PR_SET_PDEATHSIG = 1  # sys/prctl.h
_AHEAD = 2  # items that wait for each process
_PARALLEL = "TOKENIZERS_PARALLELISM"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask a run to stop: Ctrl-C, a batch system or ``kill``, a terminal that closes, SLURM ahead of time."""


def exit_code(number: int) -> int:
    """Return the exit code of a run that a signal has ended: 0 for SIGUSR1, by which a batch system asks for it."""
    return 0 if number == signal.SIGUSR1 else 128 + number


_KILLED = (
    "a process that prepares data was killed, as the system does when memory runs out; close other programs, "
    "or allow fewer cores (taskset)"
)
T = TypeVar("T")
R = TypeVar("R")
_work: list[Callable[[Any], Any]] = []  # of a process that ``in_order`` has started: the function


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of ``size``, the last one perhaps shorter; read lazily."""
    source = iter(items)
    while chunk := list(islice(source, size)):
        yield chunk


def in_order(function: Callable[[T], R], items: Iterable[T], processes: int) -> Iterator[R]:
    """Yield function(item) of every item, in their order, computed by that many forked processes; 0: by this one.

    Items are read a few ahead of the results, and are pickled; the function is inherited. An error of the function or
    of the items arrives in its place in the order. UserError if a process dies.
    """
    if not processes:
        yield from map(function, items)
        return
    source, waiting = iter(items), deque[Future[R]]()
    pool = ProcessPoolExecutor(processes, get_context("fork"), _start, (function,))
    failed: Exception | None = None

    def submit(count: int) -> None:
        nonlocal failed
        try:
            waiting.extend(pool.submit(_call, item) for item in islice(source, count))
        except Exception as error:  # to be raised when the items before have had their turn
            failed = error

    try:
        with signals_held(), _told_of_fork():
            submit(processes * _AHEAD)  # the first item starts all processes
        while waiting:
            yield waiting.popleft().result()
            if failed is None:
                submit(1)
        if failed is not None:
            raise failed
    except BrokenProcessPool as error:
        raise UserError(_KILLED) from error
    finally:
        pool.shutdown(cancel_futures=True)


class Ahead(Generic[T]):
    """The items of an iterator that a forked process makes, one item ahead of who asks for them.

    make: returns the iterator; called in that process, and its items are pickled. An error of the iterator is raised
    where its item would be. UserError if the process dies.
    """

    def __init__(self, make: Callable[[], Iterator[T]]) -> None:
        context = get_context("fork")
        self._items, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_send, args=(make, theirs))
        with signals_held(), _told_of_fork():
            self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        # Before Python waits for its processes at exit: this one waits for somebody to take an item.
        self._end = Finalize(self, _end, (self._process, self._items), exitpriority=0)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            item, error = self._items.recv()
        except (EOFError, OSError):  # the latter in the middle of an item
            raise UserError(_KILLED) from None
        if error is not None:
            raise error
        found: T = item
        return found

    def close(self) -> None:
        """End the process."""
        self._end()


def _send(make: Callable[[], Iterator[object]], items: Connection) -> None:
    prepare_worker()
    try:
        for item in make():
            items.send((item, None))
        items.send((None, StopIteration()))
    except Exception as error:
        items.send((None, error))


def _end(process: BaseProcess, items: Connection) -> None:
    process.kill()
    process.join()
    items.close()


def prepare_worker() -> None:
    """Leave signals to the main process, which stops the workers; keep what was inherited out of garbage collection.

    A main process that is killed stops nobody: the kernel then ends its workers, which would wait for it for ever.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError, AttributeError):  # not Linux: the DataLoader's own watch has to do
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    parent = parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)  # it died before the kernel was told
    gc.freeze()  # else each full collection would visit, and so unshare, the parent's objects


@contextmanager
def signals_held() -> Iterator[None]:
    """Let signals wait while workers start, who inherit that: a signal to the whole process group spares them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _told_of_fork() -> Iterator[None]:
    """Let the tokenizers library use one thread in processes that are forked inside, and not warn that it does."""
    before = os.environ.get(_PARALLEL)
    os.environ[_PARALLEL] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLEL]
        else:
            os.environ[_PARALLEL] = before


def _start(function: Callable[[Any], Any]) -> None:
    prepare_worker()
    _work.append(function)


def _call(item: object) -> Any:
    return _work[-1](item)
