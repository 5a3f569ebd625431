"""The heartbeat between the processes of a run: one that does not run any more is named, and the others do not wait.

A process that was stopped (SIGSTOP), or whose machine went down, closes no connection: the others would wait in a
collective until its timeout, hours later. So a thread of each process counts in the store, whatever the process
computes meanwhile, and another thread watches that the counts of others go on, and that the store itself answers.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import Store

from tinyllava_fast.log import log

Tell = Callable[[str], str]
"""Given who is silent, notes it and returns what to say."""
_NEIGHBOURS = 8  # processes that each one watches: all would be N^2 questions to one store
_LONGEST = 5.0  # seconds between two beats
_LINGER = 2.5  # intervals until all others have read a finding, and have left
_SILENT = "silent"  # key of the first finding, which all follow


@dataclass(frozen=True)
class Member:
    """A process of the group. machine: equal for processes that see one another. born: tells it from a later one."""

    machine: str
    pid: int
    born: str

    @classmethod
    def here(cls) -> Member:
        """This process."""
        return cls(machine(), os.getpid(), _stat(os.getpid())[0])

    @property
    def is_near(self) -> bool:
        """Whether this process can see it."""
        return self.machine == machine() and bool(self.born)

    def condition(self) -> str:
        """Return "gone", "stopped" or, if it runs or nobody here can know, nothing."""
        if not self.is_near:
            return ""
        born, state = _stat(self.pid)
        if born != self.born or state in "ZX":
            return "gone"
        return "stopped" if state in "Tt" else ""


class Heartbeat:
    """Two threads: one counts in the store and reads the counts of others, one watches how long they stand still.

    store: used by nobody else, whose calls may wait. members: by rank. patience: seconds of silence after which a
    process is lost, and with it all, or the store of a launcher. keeper: the rank in whose process the store is; None:
    it is the launcher's.
    """

    def __init__(
        self, store: Store, rank: int, members: Sequence[Member], *, patience: float, keeper: int | None
    ) -> None:
        self._store, self._rank, self._members = store, rank, members
        self._patience, self._keeper = patience, keeper
        self._interval = min(patience / 10, _LONGEST)
        size = len(members)
        self._watched = [(rank + step) % size for step in range(1, min(size, _NEIGHBOURS + 1))]
        self._counts: dict[int, bytes] = {}
        self._rounds = 0
        self._found = ""
        self._leaving = False
        self._broken = ""  # why the connection is of no use any more
        self._judged = 0, dict(self._counts)  # rounds and counts when the silences were last reckoned
        self._silence = dict.fromkeys(self._watched, 0.0)
        self._unanswered = 0.0  # seconds since the store last answered
        self._tell: Tell | None = None
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def key(rank: int) -> str:
        """Return the key of a process's count, which it sets before anybody asks for it."""
        return f"beat-{rank}"

    def watch(self, tell: Tell | None) -> None:
        """From now on end this process when another is silent. None: no longer."""
        self._silence, self._unanswered = dict.fromkeys(self._watched, 0.0), 0.0
        self._tell = tell

    def give_way(self, store: Store) -> None:
        """Wait, once a process is known to be silent: the thread that watches says so, and ends this one.

        What the main thread meets meanwhile, connections of processes that were killed or have ended, is no news.
        store: the main thread's connection.
        """
        if self._tell is not None and (self._leaving or self._found or _has_finding(store)):
            time.sleep(2 * _LINGER * self._interval)

    def stop(self) -> None:
        """End both threads: none may be inside the store when Python ends."""
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * self._interval)

    def _beat(self) -> None:
        while not self._ended.wait(self._interval):
            self._attempt()

    def _attempt(self) -> None:
        """Do a round; a connection that broke is made again, unless the run is over, and the store perhaps with it."""
        try:
            if self._broken and self._tell is not None:
                log.warning("the heartbeat's connection to the store broke: %s; connecting again", self._broken)
                self._store = self._store.clone()  # type: ignore[attr-defined]
            self._round()
            self._broken = ""
        except RuntimeError as error:
            self._broken = (str(error) or type(error).__name__).splitlines()[0]

    def _round(self) -> None:
        """Count, and read the counts of others and the first finding."""
        self._store.set(self.key(self._rank), str(self._rounds + 1))
        values = self._store.multi_get([self.key(rank) for rank in self._watched])
        self._counts = dict(zip(self._watched, values, strict=True))
        if not self._found and self._store.check([_SILENT]):
            self._found = self._store.get(_SILENT).decode(errors="replace")
        self._rounds += 1

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(self._interval):
            now = time.monotonic()
            # A process that was stopped itself has not listened meanwhile.
            passed, before = min(now - before, 2 * self._interval), now
            if self._tell is None:
                continue
            if self._found:
                self._leave(self._found, first=False)  # another process has found it
            silent, said = self._silent(passed)
            if said:
                self._leave(said, silent)

    def _silent(self, passed: float) -> tuple[list[int], str]:
        """Reckon with so many seconds more; return the ranks that are lost, and who is, in words ("": nobody)."""
        (rounds, counts), self._judged = self._judged, (self._rounds, dict(self._counts))
        if self._judged[0] != rounds:
            self._unanswered = 0.0
            for rank in self._watched:
                moved = self._judged[1].get(rank) != counts.get(rank)
                self._silence[rank] = 0.0 if moved else self._silence[rank] + passed
        elif self._keeper != self._rank:
            self._unanswered += passed
        silent = [rank for rank, seconds in self._silence.items() if seconds >= self._patience]
        said = [self._describe(rank) for rank in silent]
        if self._unanswered >= self._patience and self._keeper not in silent:
            if self._keeper is None:
                said.append(f"the launcher, which keeps the store of all processes, has not answered for {self._limit}")
            else:
                silent.append(self._keeper)
                said.append(self._describe(self._keeper))
        return silent, "; ".join(said)

    @property
    def _limit(self) -> str:
        return f"{self._patience:g} s (engine.silence_timeout)"

    def _describe(self, rank: int) -> str:
        member = self._members[rank]
        name = f"rank {rank} (process {member.pid}{'' if member.is_near else f' on {member.machine.split()[0]}'})"
        how = {"stopped": "is stopped", "gone": "was killed"}.get(member.condition(), "is stopped or cannot be reached")
        return f"{name} {how}: it has not run for {self._limit}"

    def _publish(self, said: str, others: list[int]) -> None:
        """Tell all other processes. others: gains one item if another process has done that already."""
        with suppress(RuntimeError):
            if self._store.add(f"{_SILENT}-said", 1) > 1:
                others.append(1)
            else:
                self._store.set(_SILENT, said)

    def _kill(self, member: Member) -> None:
        """Kill a silent process of this machine: stopped, it would answer no signal of its launcher."""
        if member.is_near and member.condition() != "gone":
            with suppress(OSError):
                os.kill(member.pid, signal.SIGKILL)

    def _leave(self, said: str, silent: Sequence[int] = (), *, first: bool = True) -> None:
        """End this process from its thread: the main one waits in a collective that nothing else ends.

        silent: ranks to kill. first: no other process has said it yet, as far as this one knows.
        """
        self._leaving = True
        others: list[int] = []
        if first:
            thread = threading.Thread(target=self._publish, args=(said, others), daemon=True)
            thread.start()
            thread.join(2 * self._interval)  # the store may have gone with the silent process
        for rank in silent:
            self._kill(self._members[rank])  # after the word: its connections end, and that would be all others know
        text = self._tell(said) if self._tell else said
        if first and not others:
            log.error("%s", text)
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        if self._keeper == self._rank:
            time.sleep(_LINGER * self._interval)  # the store ends with this process, and all are to read it before
        os._exit(1)


def _has_finding(store: Store) -> bool:
    with suppress(RuntimeError):
        return bool(store.check([_SILENT]))
    return False


def machine() -> str:
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
