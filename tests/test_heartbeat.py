"""The watch over silent processes, in simulated seconds. Processes that are really stopped: train/test_faults.py."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tinyllava_fast.heartbeat import LATE, Beat, Heartbeat, Member

STEP = 5.0
"""Seconds between two beats, and between two looks at them."""


class MemoryStore(dict[str, bytes]):
    """A store in this process. broken: its connections are of no use; clones: those that were made again."""

    broken, clones = False, 0

    def set(self, key: str, value: str) -> None:
        if self.broken:
            raise RuntimeError("Broken pipe\nand a trace")
        self[key] = value.encode()

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self[key] for key in keys]

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self for key in keys)

    def clone(self) -> MemoryStore:
        again = MemoryStore(self)
        again.clones = self.clones + 1
        return again


@pytest.fixture
def beat():
    """Return a heartbeat whose threads have ended before their first beat, so that the test does their work."""

    def start(rank: int, size: int, keeper: int | None) -> tuple[Heartbeat, MemoryStore]:
        store = MemoryStore({Heartbeat.key(other): b"0" for other in range(size)})
        members = [Member("elsewhere of", 100 + other, "1") for other in range(size)]
        found = Heartbeat(store, rank, members, patience=10 * STEP, keeper=keeper)
        found.stop()
        found.watch(lambda said: said)
        return found, store

    return start


def live(store: MemoryStore, ranks: Sequence[int], count: int) -> None:
    """These ranks beat."""
    for rank in ranks:
        store[Heartbeat.key(rank)] = str(count).encode()


def test_rounds_that_are_late_now_and_then_are_no_silence_of_the_keeper(beat):
    """Rank 1 of 10 watches the next eight, rank 0 not among them."""
    heartbeat, store = beat(1, 10, keeper=0)
    for count in range(1, 60):
        live(store, range(10), count)
        if count % 2:
            heartbeat._attempt()
        assert heartbeat._silent(STEP) == ([], "")


@pytest.mark.parametrize(
    ("keeper", "ranks", "said"),
    [(0, [0], "rank 0 (process 100 on elsewhere)"), (None, [], "the launcher, which keeps the store of all processes")],
)
def test_a_store_that_answers_nobody_is_named_after_the_whole_time(beat, keeper, ranks, said):
    heartbeat, store = beat(1, 10, keeper)
    live(store, range(10), 1)
    heartbeat._attempt()
    for _ in range(10):
        assert heartbeat._silent(STEP) == ([], "")
    silent, text = heartbeat._silent(STEP)
    assert silent == ranks and text.startswith(said) and "for 50 s (engine.silence_timeout)" in text


def test_a_process_that_stands_still_is_named_once(beat):
    heartbeat, store = beat(1, 3, keeper=0)
    found = []
    for count in range(1, 12):
        live(store, [0], count)
        heartbeat._attempt()
        found.append(heartbeat._silent(STEP)[0])
    assert found[:10] == [[]] * 10 and found[10] == [2]


@pytest.mark.parametrize(
    ("theirs", "found"),
    [
        ((6, True), 2),  # behind the others' 7, and they wait
        ((7, True), None),  # there already
        ((6, False), None),  # saves, validates or prepares
    ],
)
def test_a_process_that_runs_but_comes_to_no_collective_is_late(beat, theirs, found):
    heartbeat, store = beat(0, 3, keeper=None)
    heartbeat.stepping, heartbeat._entered = True, lambda: 7
    entered, stepping = theirs
    for count in range(1, 10 * LATE + 2):
        store[Heartbeat.key(1)] = str(Beat(count, 7, True)).encode()
        store[Heartbeat.key(2)] = str(Beat(count, entered, stepping)).encode()
        heartbeat._attempt()
        assert heartbeat._silent(STEP) == ([], "")
        assert heartbeat.late() == ([found] if found and count == 10 * LATE + 1 else [])
    if found:
        said = heartbeat._describe_late(2)
        assert said.startswith("rank 2 (process 102 on elsewhere) hangs: it runs, but has not come for 300 s (6 times")


def test_a_step_of_another_is_not_late_once_it_goes_on(beat):
    heartbeat, store = beat(0, 2, keeper=None)
    heartbeat._entered = lambda: 9
    for count in range(1, 200):
        store[Heartbeat.key(1)] = str(Beat(count, 5 + count // 50, True)).encode()
        heartbeat._attempt()
        assert heartbeat._silent(STEP) == ([], "") and not heartbeat.late()


def test_a_connection_that_broke_is_made_again(beat, caplog):
    heartbeat, store = beat(0, 2, keeper=None)
    heartbeat._attempt()
    store.broken = True
    heartbeat._attempt()
    assert heartbeat._rounds == 1
    heartbeat._attempt()
    assert heartbeat._rounds == 2 and heartbeat._store.clones == 1
    assert "connection to the store broke: Broken pipe; connecting again" in caplog.text
    heartbeat._store.broken = True
    heartbeat.watch(None)  # the run is over, and with it perhaps the store
    heartbeat._attempt()
    heartbeat._attempt()
    assert heartbeat._store.clones == 1
