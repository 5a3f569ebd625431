"""The heartbeat between the processes of a run: one that does not run any more is named, and the others do not wait.

A process that was stopped (SIGSTOP), or whose machine went down, closes no connection: the others would wait in a
collective until its timeout, hours later. So a thread of each process counts in the store, whatever the process
computes meanwhile, and another thread watches that the counts of others go on, and that the store itself answers.

A process that runs but never comes to the collective in which the others wait (a file server that does not answer, a
lock that nobody frees) beats all the same. So with its count goes the number of collectives that it has entered: if,
while steps are taken, that stands still below the others' for much longer than a silence may last, it is named too.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
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
LATE = 6
"""Times the silence that is allowed: for a process that runs to come to where others wait for it, within steps."""
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


@dataclass(frozen=True)
class Beat:
    """A process's count, of which it has made so many; collectives that it has entered; whether it takes steps now."""

    count: int
    entered: int = 0
    stepping: bool = False

    def __str__(self) -> str:
        return f"{self.count} {self.entered} {int(self.stepping)}"

    @classmethod
    def read(cls, text: bytes) -> Beat:
        """Return what ``str`` has written."""
        count, *more = map(int, text.split())
        return cls(count, more[0], bool(more[1])) if more else cls(count)

    def stands_behind(self, before: Beat | None, others: int) -> bool:
        """Whether it entered no collective since a beat before, and fewer than others have."""
        still = before is not None and before.stepping and before.entered == self.entered
        return still and self.stepping and self.entered < others


class Heartbeat:
    """Two threads: one counts in the store and reads the counts of others, one watches how long they stand still.

    store: used by nobody else, whose calls may wait. members: by rank. patience: seconds of silence after which a
    process is lost, and with it all, or the store of a launcher. keeper: the rank in whose process the store is; None:
    it is the launcher's. entered: returns the number of collectives that this process has entered.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        members: Sequence[Member],
        *,
        patience: float,
        keeper: int | None,
        entered: Callable[[], int] = lambda: 0,
    ) -> None:
        self._store, self._rank, self._members, self._entered = store, rank, members, entered
        self._patience, self._keeper = patience, keeper
        self._interval = min(patience / 10, _LONGEST)
        size = len(members)
        self._watched = [(rank + step) % size for step in range(1, min(size, _NEIGHBOURS + 1))]
        self.stepping = False
        """Whether this process takes steps, in each of which it comes to a collective; else it is never late."""
        self._own = Beat(0)
        self._counts: dict[int, Beat] = {}
        self._rounds = 0
        self._found = ""
        self._late: list[int] = []  # ranks that what is found calls late
        self._leaving = False
        self._broken = ""  # why the connection is of no use any more
        self._judged = 0, dict(self._counts)  # rounds and counts when the silences were last reckoned
        self._silence = dict.fromkeys(self._watched, 0.0)
        self._behind = dict.fromkeys(self._watched, 0.0)
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
        self._behind = dict.fromkeys(self._watched, 0.0)
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
        self._own = Beat(self._rounds + 1, self._entered(), self.stepping)
        self._store.set(self.key(self._rank), str(self._own))
        values = self._store.multi_get([self.key(rank) for rank in self._watched])
        self._counts = dict(zip(self._watched, map(Beat.read, values), strict=True))
        if not self._found and self._store.check([_SILENT]):
            self._found, self._late = json.loads(self._store.get(_SILENT))
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
            if late := self.late():
                self._late = late
                self._leave("; ".join(map(self._describe_late, late)), late)

    def _silent(self, passed: float) -> tuple[list[int], str]:
        """Reckon with so many seconds more; return the ranks that are lost, and who is, in words ("": nobody)."""
        (rounds, counts), self._judged = self._judged, (self._rounds, dict(self._counts))
        if self._judged[0] != rounds:
            self._unanswered = 0.0
            for rank in self._watched:
                before, now = counts.get(rank), self._judged[1].get(rank)
                self._silence[rank] = 0.0 if now != before else self._silence[rank] + passed
                behind = now is not None and now.stands_behind(before, self._own.entered)
                self._behind[rank] = self._behind[rank] + passed if behind else 0.0
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

    def late(self) -> list[int]:
        """Return the ranks that run, but have not come to where others wait for them."""
        return [rank for rank, seconds in self._behind.items() if seconds >= LATE * self._patience]

    @property
    def _limit(self) -> str:
        return f"{self._patience:g} s (engine.silence_timeout)"

    def _name(self, rank: int) -> str:
        member = self._members[rank]
        return f"rank {rank} (process {member.pid}{'' if member.is_near else f' on {member.machine.split()[0]}'})"

    def _describe(self, rank: int) -> str:
        condition = self._members[rank].condition()
        how = {"stopped": "is stopped", "gone": "was killed"}.get(condition, "is stopped or cannot be reached")
        return f"{self._name(rank)} {how}: it has not run for {self._limit}"

    def _describe_late(self, rank: int) -> str:
        seconds = f"{LATE * self._patience:g} s ({LATE} times engine.silence_timeout)"
        return f"{self._name(rank)} hangs: it runs, but has not come for {seconds} to where the others wait for it"

    def _publish(self, said: str, others: list[int]) -> None:
        """Tell all other processes. others: gains one item if another process has done that already."""
        with suppress(RuntimeError):
            if self._store.add(f"{_SILENT}-said", 1) > 1:
                others.append(1)
            else:
                self._store.set(_SILENT, json.dumps([said, self._late]))

    def _kill(self, member: Member) -> None:
        """Kill a silent process of this machine: stopped, it would answer no signal of its launcher."""
        if member.is_near and member.condition() != "gone":
            with suppress(OSError):
                os.kill(member.pid, signal.SIGKILL)

    def _leave(self, said: str, silent: Sequence[int] = (), *, first: bool = True) -> None:
        """End this process from its thread: the main one waits in a collective that nothing else ends.

        silent: ranks to kill. first: no other process has said it yet, as far as this one knows.
        """
        if self._rank in self._late:
            log.error("rank %d hangs here:\n%s", self._rank, _place_of_main())
        self._leaving = True
        others: list[int] = []
        if first:
            thread = threading.Thread(target=self._publish, args=(said, others), daemon=True)
            thread.start()
            thread.join(2 * self._interval)  # the store may have gone with the silent process
        if self._late:
            time.sleep(_LINGER * self._interval)  # it runs: it says where it hangs, and ends by itself
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


def _place_of_main() -> str:
    """Return the innermost calls that this process's main thread is in."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)[-8:])


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
