"""The heartbeat between the processes of a run: one that does not run any more is named, and the others do not wait.

A process that was stopped (SIGSTOP), or whose machine went down, closes no connection: the others would wait in a
collective until its timeout, hours later. So a thread of each process counts in the store, whatever the process
computes meanwhile, and another thread watches that the counts of others go on.
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
    process is lost. keeper: the rank in whose process the store is; None: it is the launcher's, which outlives them.
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
        self._silence = dict.fromkeys(range(size), 0.0)
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
        self._silence = dict.fromkeys(self._silence, 0.0)
        self._tell = tell

    def stop(self) -> None:
        """End both threads: none may be inside the store when Python ends."""
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * self._interval)

    def _beat(self) -> None:
        keys = [self.key(rank) for rank in self._watched]
        with suppress(RuntimeError):  # the store has died with its process, which those who wait for it will see
            while not self._ended.wait(self._interval):
                self._store.set(self.key(self._rank), str(self._rounds + 1))
                self._counts = dict(zip(self._watched, self._store.multi_get(keys), strict=True))
                if not self._found and self._store.check([_SILENT]):
                    self._found = self._store.get(_SILENT).decode(errors="replace")
                self._rounds += 1

    def _watch(self) -> None:
        rounds, counts, before = 0, dict(self._counts), time.monotonic()
        while not self._ended.wait(self._interval):
            now = time.monotonic()
            # A process that was stopped itself has not listened meanwhile.
            passed, before = min(now - before, 2 * self._interval), now
            if self._tell is None:
                continue
            if self._found:
                self._leave(self._found)  # another process has found it
            fresh = dict(self._counts)
            if self._rounds != rounds:
                for rank in self._watched:
                    moved = fresh.get(rank) != counts.get(rank)
                    self._silence[rank] = 0.0 if moved else self._silence[rank] + passed
            elif self._keeper not in (None, self._rank):  # the store itself does not answer
                self._silence[int(self._keeper or 0)] += passed
            rounds, counts = self._rounds, fresh
            silent = [rank for rank, seconds in self._silence.items() if seconds >= self._patience]
            if silent:
                said = "; ".join(self._describe(rank) for rank in silent)
                for rank in silent:
                    self._kill(self._members[rank])
                self._leave(said)

    def _describe(self, rank: int) -> str:
        member, seconds = self._members[rank], f"{self._patience:g} s (engine.silence_timeout)"
        name = f"rank {rank} (process {member.pid}{'' if member.is_near else f' on {member.machine.split()[0]}'})"
        how = {"stopped": "is stopped", "gone": "was killed"}.get(member.condition(), "is stopped or cannot be reached")
        return f"{name} {how}: it has not run for {seconds}"

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

    def _leave(self, said: str) -> None:
        """End this process from its thread: the main one waits in a collective that nothing else ends."""
        others: list[int] = []
        thread = threading.Thread(target=self._publish, args=(said, others), daemon=True)
        thread.start()
        thread.join(2 * self._interval)  # the store may have gone with the silent process
        text = self._tell(said) if self._tell else said
        if not others:
            log.error("%s", text)
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(1)


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
