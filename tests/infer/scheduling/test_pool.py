"""The K/V pool keeps to its budget, long queues take no memory, and running out of it shrinks the batch."""

from __future__ import annotations

import gc
import random
import tracemalloc
from dataclasses import replace
from itertools import count, pairwise

import pytest
import torch

from tests.infer.scheduling.test_admission import waiting
from tests.infer.test_engine import QUESTIONS, ask, mixed_requests
from tests.tiny import make_engine
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.core import is_out_of_memory
from tinyllava_fast.infer.scheduling.admission import admit, grow, release, requeue
from tinyllava_fast.infer.scheduling.pool import KVPool
from tinyllava_fast.infer.scheduling.sequence import RESERVE, Group, Sequence
from tinyllava_fast.log import log


def test_pool_is_sized_by_bytes_and_never_exceeded(lmm, tokenizer, engine, images):
    row = 2 * 3 * 2 * 12 * 4  # K and V, 3 layers, 2 heads of 12, float32
    small = make_engine(lmm, tokenizer, batch_tokens=None, kv_cache_bytes=500 * row + row - 1)
    assert small.batch_tokens == 500 and small.kv_cache_bytes == 500 * row
    requests = [*mixed_requests(images), ask("go on", images[2], new=150, eos_token_id=())]
    used, spans = [], small._decoder.pool.rows
    step = small._decoder.step

    def watched(sequences):
        ranges = sorted(
            {s.shared_rows for s in sequences if s.shared_rows[1]} | {(s.start, s.num_reserved_rows) for s in sequences}
        )
        assert all(a + n <= b for (a, n), (b, _) in pairwise(ranges)) and sum(ranges[-1]) <= 500
        used.append(500 - small._decoder.pool.rows.free_rows)
        return step(sequences)

    small._decoder.step = watched
    assert [a.tokens for a in small.answers(requests)] == [a.tokens for a in engine.answers(requests)]
    assert max(used) > 350 and spans.size == 500 and small.kv_cache_bytes == 500 * row
    with pytest.raises(UserError, match="give one of them"):
        make_engine(lmm, tokenizer, kv_cache_bytes=row)
    with pytest.raises(UserError, match="a token takes 576; the K/V pool needs room"):
        make_engine(lmm, tokenizer, batch_tokens=None, kv_cache_bytes=row)


def test_sequences_that_outgrow_the_pool_start_anew(lmm, tokenizer, engine):
    requests = [ask(q, new=90 + i, eos_token_id=(), temperature=i % 2, seed=i) for i, q in enumerate(QUESTIONS)]
    tight = make_engine(lmm, tokenizer, batch_tokens=520)
    assert [a.tokens for a in tight.answers(requests)] == [a.tokens for a in engine.answers(requests)]
    assert tight.counters.computed_tokens > engine.counters.computed_tokens  # some were computed twice
    assert tight._decoder.pool.rows.free_rows == 520


@pytest.mark.no_cover  # what coverage notes is memory, too, and time
def test_a_long_queue_takes_no_more_memory_than_a_short_one(lmm, tokenizer):
    """Peak of Python's own objects while the queue is read and grouped; the model's part does not depend on it."""
    engine = make_engine(lmm, tokenizer, lookahead=32, batch_tokens=1024, prefill_tokens=128)

    def peak(number: int) -> int:
        queue = (ask(f"question {i}", new=1, id=str(i)) for i in range(number))
        gc.collect()
        tracemalloc.start()
        for _ in engine._prompts.sequences(queue):
            pass
        answered = sum(1 for _ in engine.run(ask(f"question {i}", new=1, id=str(i)) for i in range(number // 20)))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert answered == number // 20
        return size

    peak(100)  # what is cached once
    assert peak(10_000) < 1.3 * peak(2000)  # of which 500 and 100 are answered; whatever is kept grows fivefold


def occupancy(monkeypatch, reserve: int) -> float:
    """Share of a pool's rows in use, refilled as the engine does, on ten questions an image behind 230 shared tokens:
    most answers are words, some are paragraphs, 512 tokens are allowed."""
    monkeypatch.setattr("tinyllava_fast.infer.scheduling.sequence.RESERVE", reserve)
    rng, numbers = random.Random(0), count()
    pool = KVPool(16384, [1], 1, dtype=torch.float32, device=torch.device("cpu"))
    left: dict[Sequence, int] = {}

    def group() -> Group:
        prompts = [[*range(230), *(1000 + next(numbers) for _ in range(rng.randint(20, 60)))] for _ in range(10)]
        members = [waiting(prompt, "x", new=512) for prompt in prompts]
        left.update({m: rng.randint(30, 400) if rng.random() < 0.3 else rng.randint(1, 8) for m in members})
        return Group("x", members, 230)

    queue, flight, shares = [group()], [], []
    for step in range(900):
        roomy = pool.rows.free_rows * 2 >= 16384
        while roomy and (taken := admit(queue, pool.rows, room=1)):
            for member in (m for g in taken for m in g.members):
                member.num_cached_tokens = len(member.prompt) + len(member.tokens)
                flight.append(member)
            queue = queue or [group()]
        prefixes = {m.group: m.group.num_shared_tokens for m in flight}
        if step >= 200:
            shares.append((sum(m.num_own_cached for m in flight) + sum(prefixes.values())) / 16384)
        for member in list(flight):
            if member not in flight:
                continue
            left[member] -= 1
            if left[member] <= 0:
                flight.remove(member)
                release(member, pool.rows)
                continue
            member.tokens.append(0)
            member.num_cached_tokens += 1
            while member in flight and member.num_own_cached >= member.num_reserved_rows and not grow(member, pool):
                queue[:0] = requeue([flight.pop()], pool.rows)
    return sum(shares) / len(shares)


def test_occupancy_of_the_pool_on_a_realistic_mix(monkeypatch):
    assert occupancy(monkeypatch, RESERVE) > 0.58
    assert occupancy(monkeypatch, 512) < 0.3  # what a range for the longest answer would leave


class Failing:
    """Raises an out-of-memory error where more than ``most`` tokens or sequences are asked for."""

    def __init__(self, inner, most: int, error: Exception) -> None:
        self.inner, self.most, self.error, self.raised = inner, most, error, 0

    def __call__(self, spans):
        size = sum(len(s.ids) if hasattr(s, "ids") else 1 for s in spans)
        if size > self.most:
            self.raised += 1
            raise self.error
        return self.inner(spans)


GUESSED = [ask("say red blue red blue red blue", new=40 + n, eos_token_id=()) for n in range(3)]
CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.fixture
def warnings(monkeypatch):
    """Texts of the warnings that are logged."""
    lines: list[str] = []
    monkeypatch.setattr(log, "warning", lambda text, *values: lines.append(text % values))
    return lines


@pytest.mark.parametrize("error", [CPU_ERROR, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_out_of_memory_in_a_prefill(lmm, tokenizer, engine, images, warnings, monkeypatch, error):
    requests = [*mixed_requests(images), ask("say", temperature=1.0, seed=4)]
    small = make_engine(lmm, tokenizer)
    failing = Failing(type(small._decoder).__call__.__get__(small._decoder), 260, error)
    monkeypatch.setattr(type(small._decoder), "__call__", lambda self, spans: failing(spans))
    answers = small.answers(requests)
    monkeypatch.undo()
    assert [a.tokens for a in answers] == [a.tokens for a in engine.answers(requests)]
    assert failing.raised > 1 and small._decoder.pool.rows.free_rows == small.batch_tokens
    assert len(warnings) == failing.raised and "prefill_tokens is now" in warnings[0]


def test_out_of_memory_in_a_step(lmm, tokenizer, engine, images, warnings):
    requests = [*mixed_requests(images), ask("say", new=40, temperature=1.0, seed=4)]
    small = make_engine(lmm, tokenizer)
    failing = Failing(small._decoder.step, 5, CPU_ERROR)
    small._decoder.step = failing
    assert [a.tokens for a in small.answers(requests)] == [a.tokens for a in engine.answers(requests)]
    assert failing.raised >= 2 and small._decoder.pool.rows.free_rows == small.batch_tokens
    assert len(warnings) == failing.raised and "run together now" in warnings[-1]


@pytest.mark.parametrize("online", [True, False], ids=["online", "in groups"])
@pytest.mark.parametrize(("speculate", "at"), [(0, 0), (0, 1), (0, 4), (8, 3)], ids=str)
def test_out_of_memory_in_the_logits(lmm, tokenizer, engine, images, warnings, online, speculate, at):
    """After the K/V of the pass have been written: of a prefill, of steps, and of one with guesses."""
    requests = [replace(r, id=str(i)) for i, r in enumerate([*mixed_requests(images), *GUESSED])]
    small = make_engine(lmm, tokenizer, speculate=speculate)
    logits, verify, calls, raised = small.model.logits, small._core._verify, 0, 0
    verified = 0  # sequences in a step with guesses

    def watched(sequences: list[Sequence], guesses: dict[Sequence, list[int]]) -> None:
        nonlocal verified
        verified = len(sequences)
        try:
            verify(sequences, guesses)
        finally:
            verified = 0

    def failing(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal calls, raised
        several = verified > 1 if speculate else len(hidden) > 1  # one alone cannot be helped
        calls += several
        if several and not raised and calls > at:
            raised += 1
            raise torch.OutOfMemoryError("no room")
        return logits(hidden)

    small._core._verify, small.model.logits = watched, failing
    found = {}
    if online:
        for request in requests:
            small.add_request(request)
        for _ in range(2000):
            found |= {a.id: a.tokens for a in small.step()}
            if not small.unfinished:
                break
    else:
        found = {a.id: a.tokens for a in small.answers(requests)}
    assert raised == 1 and len(warnings) == 1
    assert found == {a.id: a.tokens for a in engine.answers(requests)}
    assert small._core.scheduler.limits.prefill_tokens > 1
    assert small.usage.free_rows + small.usage.kept_rows == small.usage.rows


def test_out_of_memory_of_one_request_names_it(lmm, tokenizer):
    small = make_engine(lmm, tokenizer)
    small._decoder.step = Failing(small._decoder.step, 0, CPU_ERROR)
    with pytest.raises(UserError, match=r"'q1'.*out of memory in a step of one sequence"):
        small.answers([]) or list(small.run([ask("what?", id="q1", eos_token_id=())]))
    assert small._decoder.pool.rows.free_rows == small.batch_tokens
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and is_out_of_memory(MemoryError())


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.no_cover])]
)
def test_compiled_steps_say_the_same(lmm, tokenizer, engine, images, monkeypatch, backend):
    monkeypatch.setattr("tinyllava_fast.infer.fast_model.compiled_step.BACKEND", backend)
    requests = mixed_requests(images)[:7]
    compiled = make_engine(lmm, tokenizer, compile=True)
    assert [a.tokens for a in compiled.answers(requests)] == [a.tokens for a in engine.answers(requests)]
    assert [a.tokens for a in compiled.answers(requests[:1])] == [a.tokens for a in engine.answers(requests[:1])]
    assert set(compiled._decoder._run_step._graphs) == {True, False}
    never = make_engine(lmm, tokenizer, compile=False)
    assert never.answers(requests[:1])[0].tokens and not never._decoder._run_step._graphs
