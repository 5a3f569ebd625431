"""Who is next, how much of whose prompt a pass computes, and who waits for what another is about to compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.infer.test_engine import ask
from tests.tiny import make_engine
from tinyllava_fast.infer.scheduling.online import FIRST_CHUNK, LEAST_CHUNK, MOST_RIDES, OnlineQueue, Pace
from tinyllava_fast.infer.scheduling.pool import KVPool
from tinyllava_fast.infer.scheduling.prefixes import PrefixCache
from tinyllava_fast.infer.scheduling.sequence import Sequence, Status


@pytest.fixture
def queue() -> OnlineQueue:
    pool = KVPool(1000, [1], 4, dtype=torch.float32, device=torch.device("cpu"))
    return OnlineQueue(PrefixCache(pool))


def sequence(prompt: list[int], priority: int = 0) -> Sequence:
    return Sequence(replace(ask("?", new=4), priority=priority), prompt, online=True)


def test_chunks_take_as_long_as_a_step_for_each_that_waits() -> None:
    pace = Pace()
    assert pace.chunk(1) == FIRST_CHUNK
    pace.stepped(8, 0.1)
    pace.prefilled(100, 0.1)
    assert pace.chunk(1) == 100 and pace.chunk(5) == 500
    for _ in range(50):
        pace.stepped(8, 0.001)
    assert pace.chunk(1) == LEAST_CHUNK
    assert Pace(chunk_tokens=33).chunk(9) == 33


def test_riders_add_a_part_of_a_step() -> None:
    pace = Pace()
    assert pace.riders(8, 1, 32) == LEAST_CHUNK and not pace.knows(8)
    pace.stepped(8, 0.1)
    assert pace.knows(8) and pace.knows(9) and not pace.knows(16) and not pace.knows(4)
    pace.rode(4, 0.1 + 4 * 0.0049)
    assert pace.riders(8, 1, 32) == 12 and pace.riders(8, 2, 5) == 5
    assert pace.riders(8, 0, 32) == pace.riders(8, 3, 32) == pace.riders(0, 1, 32) == 0
    for _ in range(MOST_RIDES):
        pace.rode(4, 5.0)
    assert pace.riders(8, 1, 32) == LEAST_CHUNK  # a prompt goes on in any case
    assert not pace.knows(8)  # what steps take may have changed
    pace.stepped(20, 0.5)
    assert pace.knows(20) and pace.step_seconds == 0.5  # of other steps an average says nothing
    assert Pace(chunk_tokens=8).riders(1, 9, 32) == 8 and Pace(chunk_tokens=40).riders(1, 9, 32) == 0


def test_smaller_priorities_and_earlier_arrivals_come_first(queue: OnlineQueue) -> None:
    late, urgent, early = sequence([1] * 9), sequence([2] * 9, priority=-1), sequence([3] * 9)
    for one in (early, late, urgent):
        queue.add(one)
    assert queue.num_waiting == len(queue) == 3
    parts = queue.next_parts(20, None)
    assert [(s, stop) for s, stop in parts] == [(urgent, 9), (early, 9), (late, 2)]
    late.num_cached_tokens = 2
    assert queue.num_waiting == 0 and len(queue) == 1
    assert queue.next_parts(100, None) == [(late, 9)] and len(queue) == 0


def test_the_number_of_sequences_and_the_pool_bound_admission(queue: OnlineQueue) -> None:
    for number in range(3):
        queue.add(sequence([number] * 450))
    assert len(queue.next_parts(10**6, 1)) == 1
    assert len(queue.next_parts(10**6, None)) == 1  # two fill the pool
    assert queue.next_parts(10**6, None) == [] and queue.num_waiting == 1


def test_who_begins_alike_waits_and_shares(queue: OnlineQueue) -> None:
    shared = list(range(100))
    first, second, other = sequence([*shared, 7]), sequence([*shared, 8, 9]), sequence([5] * 30)
    for one in (first, second, other):
        queue.add(one)
    assert queue.next_parts(500, None) == [(first, 101), (other, 30)] and queue.num_waiting == 1
    first.num_cached_tokens = 101
    assert queue.next_parts(500, None) == [(second, 102)]
    assert second.num_cached_tokens == second.num_reused_tokens == 100
    assert first.shared_rows == second.shared_rows == (0, 100)


def test_an_ended_one_is_forgotten_and_one_sent_back_comes_first(queue: OnlineQueue) -> None:
    first, second, third = (sequence([number] * 40) for number in range(3))
    for one in (first, second, third):
        queue.add(one)
    second.abort()
    parts = queue.next_parts(50, None)
    assert parts == [(first, 40), (third, 10)]
    third.num_cached_tokens = 10
    queue.send_back(third)
    assert third.status is Status.WAITING and third.num_reserved_rows == 0
    queue.add(fourth := sequence([4] * 40))
    assert [s for s, _ in queue.next_parts(60, None)] == [third, fourth]


def test_urgent_requests_overtake(lmm, tokenizer) -> None:
    engine = make_engine(lmm, tokenizer, batch_tokens=700)
    for name in ("a", "b", "c"):
        engine.add_request(replace(ask(name * 300, new=5), id=name))
    engine.add_request(replace(ask("now!" * 75, new=5), id="urgent", priority=-1))
    order: list[str] = []
    while engine.unfinished:
        order += [a.id for a in engine.step()]
    assert order[0] == "urgent" and sorted(order) == ["a", "b", "c", "urgent"]
