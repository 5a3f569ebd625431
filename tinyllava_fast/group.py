"""The processes of a run, as torchrun or a scheduler starts them: they join, speak once, and name the one that died.

A collective whose partner has died ends, on every other process, in an error of the transport that names an address.
What a person needs is the rank and the reason: processes leave a word in the store before they end, and those of one
machine see one another in /proc.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from tinyllava_fast.errors import LostError, SaidError, UserError

T = TypeVar("T")
_TRANSPORT = re.compile(r"gloo|NCCL|Connection (?:closed|reset|refused)|Broken pipe|Socket Timeout|TCPStore", re.I)
_PATIENCE = 2.0  # seconds until a process that died has been seen to be dead, or has left its word


@dataclass(frozen=True)
class _Member:
    """A process of the group. machine: equal for processes that see one another. born: tells it from a later one."""

    machine: str
    pid: int
    born: str

    def condition(self) -> str:
        """Return "gone", "stopped" or, if it runs or nobody here can know, nothing."""
        if self.machine != _machine() or not self.born:
            return ""
        born, state = _stat(self.pid)
        if born != self.born or state in "ZX":
            return "gone"
        return "stopped" if state in "Tt" else ""


@dataclass
class _Group:
    """The processes that this one has joined. runs: so many have begun in it; each has words of its own."""

    store: Store
    rank: int
    members: list[_Member]
    runs: int = 0

    def end_of(self, rank: int) -> str:
        """Return the key of a process's word."""
        return f"end-{self.runs}-{rank}"


_joined: list[_Group] = []  # one, once this process is in a group


def join(backend: str, timeout: timedelta | None = None) -> None:
    """Join the group that torchrun's variables describe; once. timeout: of a collective, None: torch's.

    torchrun keeps one store for all its attempts, in which restarted processes would find the addresses of dead ones,
    so each attempt has keys of its own.
    """
    if torch.distributed.is_initialized():
        return
    store, rank, size = next(rendezvous("env://", timeout=default_pg_timeout))  # to find one another
    store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    own = PrefixStore("tlf", store)
    own.set(f"member-{rank}", json.dumps([_machine(), os.getpid(), _stat(os.getpid())[0]]))
    members = [_Member(*json.loads(own.get(f"member-{other}"))) for other in range(size)]
    _joined[:] = [_Group(own, rank, members)]
    # Not at the end of a run: DeepSpeed keeps its groups for as long as the process lives.
    atexit.register(torch.distributed.destroy_process_group)


def gather(item: T) -> list[T]:
    """Return every process's item, in the order of ranks; all call it. A process without a group has its own alone."""
    if not torch.distributed.is_initialized():
        return [item]
    items: list[T] = [item] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(items, item)
    return items


def from_first(item: T) -> T:
    """Return rank 0's item in every process; all call it."""
    return gather(item)[0]


def decided(work: Callable[[], T]) -> T:
    """Return what ``work`` gives in rank 0, in every process; a UserError of it is raised in each."""
    result: tuple[T | None, UserError | None] = None, None
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        try:
            result = work(), None
        except UserError as error:
            result = None, error
    value, failure = from_first(result)
    if failure is not None:
        raise failure
    return cast(T, value)


@contextmanager
def in_concert() -> Iterator[None]:
    """Around all that a process does: before it ends by an error it tells the others why.

    An error that several have in common stays in one of them; it is a SaidError in the rest.
    """
    for group in _joined:
        group.runs += 1
    try:
        with losses_named():
            yield
    except Exception as error:
        lost = isinstance(error, LostError)
        name = "" if isinstance(error, UserError) or not str(error) else f"{type(error).__name__}: "
        _leave_word("" if lost else name + (str(error) or type(error).__name__).splitlines()[0])
        if isinstance(error, (UserError, LostError)) and not _says(str(error)):
            raise SaidError(str(error), 1 if lost else 2) from None
        raise


def _leave_word(reason: str) -> None:
    """Tell the other processes why this one ends. "": because another one did."""
    for group in _joined:
        with suppress(RuntimeError):  # the store has died with its process
            group.store.set(group.end_of(group.rank), reason)


def _says(text: str) -> bool:
    """Return True in one of the processes that come to say the same text."""
    for group in _joined:
        with suppress(RuntimeError):
            return group.store.add(f"said-{group.runs}-{hashlib.sha1(text.encode()).hexdigest()}", 1) == 1
    return True


@contextmanager
def losses_named() -> Iterator[None]:
    """Around collectives: the transport's error, once a process has died, becomes a LostError that names it."""
    try:
        yield
    except LostError:
        raise
    except RuntimeError as error:
        if not _joined or not _is_transport(error):
            raise
        with _undisturbed():
            if not (who := _lost(_joined[0])):
                raise
        raise LostError(f"{who}. The other processes cannot go on without it") from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore SIGTERM, which torchrun sends now: this process ends by itself, once it has said why."""
    before = signal.getsignal(signal.SIGTERM)
    main = threading.current_thread() is threading.main_thread()  # the only one that may set handlers
    if main:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    except BaseException:
        if main:
            signal.signal(signal.SIGTERM, before)
        raise


def _is_transport(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or bool(_TRANSPORT.search(str(error)))


def _lost(group: _Group) -> str:
    """Return which processes are gone and why; "" if all are there."""
    until = time.monotonic() + _PATIENCE
    found: list[str] = []
    while not found and time.monotonic() < until:
        time.sleep(0.05)
        words = _words(group)
        for rank, member in enumerate(group.members):
            condition = member.condition()
            if words.get(rank):
                found.append(f"rank {rank} has ended: {words[rank]}")
            elif rank not in words and rank != group.rank and condition:
                how = "was killed, by a signal or for want of memory" if condition == "gone" else "is stopped"
                found.append(f"rank {rank} (process {member.pid}) {how}")
    if not found and any(member.machine != _machine() or not member.born for member in group.members):
        return "a process of another machine has ended or cannot be reached; its own output says why"
    return "; ".join(found)


def _words(group: _Group) -> dict[int, str]:
    """Return what other processes that have ended left as a word."""
    words = {}
    for rank in range(len(group.members)):
        try:
            if rank != group.rank and group.store.check([group.end_of(rank)]):
                words[rank] = group.store.get(group.end_of(rank)).decode(errors="replace")
        except RuntimeError:
            return words
    return words


def _machine() -> str:
    """Return a name of this machine, and of the part of it whose processes this one sees."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}"


def _stat(pid: int) -> tuple[str, str]:
    """Return when a process was born, in the kernel's ticks, and its state; ("", "X") if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", "X"
    return fields[19], fields[0]
