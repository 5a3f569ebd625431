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
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from tinyllava_fast.errors import Interruption, LostError, SaidError, ShortageError, UserError
from tinyllava_fast.heartbeat import Heartbeat, Member, Tell

T = TypeVar("T")
_TRANSPORT = re.compile(r"gloo|NCCL|Connection (?:closed|reset|refused)|Broken pipe|Socket Timeout|TCPStore", re.I)
_PATIENCE = 2.0  # seconds until a process that died has been seen to be dead, or has left its word


@dataclass
class _Group:
    """The processes that this one has joined. runs: so many have begun in it; each has words of its own."""

    store: Store
    rank: int
    members: list[Member]
    runs: int = 0
    heartbeat: Heartbeat | None = None

    def end_of(self, rank: int) -> str:
        """Return the key of a process's word."""
        return f"end-{self.runs}-{rank}"


_joined: list[_Group] = []  # one, once this process is in a group


def join(backend: str, timeout: timedelta | None = None, silence: float = 0) -> None:
    """Join the group that torchrun's variables describe; once. timeout: of a collective, None: torch's.

    silence: seconds after which a process that does not run is lost (see watched); 0: never.

    torchrun keeps one store for all its attempts, in which restarted processes would find the addresses of dead ones,
    so each attempt has keys of its own.
    """
    if torch.distributed.is_initialized():
        return
    store, rank, size = next(rendezvous("env://", timeout=default_pg_timeout))  # to find one another
    store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    own = PrefixStore("tlf", store)
    own.set(Heartbeat.key(rank), "0")
    own.set(f"member-{rank}", json.dumps(asdict(Member.here())))
    members = [Member(**json.loads(own.get(f"member-{other}"))) for other in range(size)]
    _joined[:] = [_Group(own, rank, members)]
    # Not at the end of a run: DeepSpeed keeps its groups for as long as the process lives.
    atexit.register(torch.distributed.destroy_process_group)
    if silence and size > 1:
        keeper = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
        # Its own connection: on another's, a beat would wait behind whatever that waits for.
        line: Store = own.clone()  # type: ignore[attr-defined]
        heartbeat = Heartbeat(line, rank, members, patience=silence, keeper=keeper, entered=_entered)
        _joined[0].heartbeat = heartbeat
        atexit.register(heartbeat.stop)


def _entered() -> int:
    """Return the number of collectives that this process has entered, in all groups; 0 if a backend does not count."""
    with suppress(RuntimeError, AttributeError):
        world = torch.distributed.distributed_c10d._world
        numbers = [one._get_sequence_number_for_group() for one in list(world.pg_map)]  # type: ignore[attr-defined]
        return sum(map(int, numbers))
    return 0


def stepping(now: bool) -> None:
    """Note whether this process takes steps from now on, in which the others may wait for it for a bounded time only.

    Not while it prepares, compiles, saves or validates: one process may then keep the others for hours.
    """
    for group in _joined:
        if group.heartbeat:
            group.heartbeat.stepping = now


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
    """Around all that a process does: before it ends by an error or a signal it tells the others why.

    An error that several have in common stays in one of them; it is a SaidError in the rest.
    """
    for group in _joined:
        group.runs += 1
    try:
        with losses_named():
            yield
    except BaseException as error:
        lost = isinstance(error, LostError)
        plain = isinstance(error, UserError) or not isinstance(error, Exception) or not str(error)  # a text for people
        name = "" if plain else f"{type(error).__name__}: "
        reason = "" if lost else name + (str(error) or type(error).__name__).splitlines()[0]
        _leave_word(reason, error.number if isinstance(error, Interruption) else 0)
        if isinstance(error, (UserError, LostError)) and not _says(str(error)):
            raise SaidError(str(error), 1 if lost or isinstance(error, ShortageError) else 2) from None
        raise


@contextmanager
def watched(tell: Tell) -> Iterator[None]:
    """Around the work of a run: while it lasts, this process ends with exit code 1 once another is silent.

    tell: given which rank is silent, notes it and returns what to say, which one process does. It runs in a thread of
    its own and must not wait for others.
    """
    beats = [group.heartbeat for group in _joined if group.heartbeat]
    for heartbeat in beats:
        heartbeat.watch(lambda silent: tell(_not_without(silent)))
    try:
        yield
    finally:
        for heartbeat in beats:
            heartbeat.watch(None)


def _not_without(who: str) -> str:
    return f"{who}. The other processes cannot go on without it"


def _leave_word(reason: str, stop: int) -> None:
    """Tell the other processes why this one ends. "": because another one did. stop: see LostError."""
    for group in _joined:
        with suppress(RuntimeError):  # the store has died with its process
            group.store.set(group.end_of(group.rank), json.dumps([reason, stop]))


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
            who, stop = _lost(_joined[0])
            if not who:
                raise
        raise LostError(_not_without(who), stop) from error


def lost() -> tuple[str, int]:
    """Return which other processes are lost and why, in a sentence, and the signal that told them to stop (0: none).

    ("", 0) if all are there, which takes two seconds to know, or if this one is alone.
    """
    who, stop = _lost(_joined[0]) if _joined and len(_joined[0].members) > 1 else ("", 0)
    return (_not_without(who), stop) if who else ("", 0)


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


def _lost(group: _Group) -> tuple[str, int]:
    """Return which processes are gone and why, and the signal that told one to stop; ("", 0) if all are there."""
    if group.heartbeat:
        group.heartbeat.give_way(group.store)
    until = time.monotonic() + _PATIENCE
    found: list[str] = []
    words: dict[int, tuple[str, int]] = {}
    while not found and time.monotonic() < until:
        time.sleep(0.05)
        words = _words(group)
        for rank, member in enumerate(group.members):
            condition = member.condition()
            if rank in words and words[rank][0]:
                found.append(f"rank {rank} has ended: {words[rank][0]}")
            elif rank not in words and rank != group.rank and condition:
                how = "was killed, by a signal or for want of memory" if condition == "gone" else "is stopped"
                found.append(f"rank {rank} (process {member.pid}) {how}")
    if not found and not all(member.is_near for member in group.members):
        return "a process of another machine has ended or cannot be reached; its own output says why", 0
    stops = [stop for reason, stop in words.values() if reason and stop]
    return "; ".join(found), stops[0] if stops and len(stops) == len(found) else 0


def _words(group: _Group) -> dict[int, tuple[str, int]]:
    """Return the words that other processes that have ended left, and the signal that told them to stop."""
    words: dict[int, tuple[str, int]] = {}
    for rank in range(len(group.members)):
        try:
            if rank != group.rank and group.store.check([group.end_of(rank)]):
                reason, stop = json.loads(group.store.get(group.end_of(rank)))
                words[rank] = reason, stop
        except RuntimeError:
            return words
    return words
