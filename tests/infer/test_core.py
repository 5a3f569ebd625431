"""Requests come, fail and are aborted one by one while others run, and nobody else sees anything of it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.infer.test_engine import QUESTIONS, ask, mixed_requests
from tests.tiny import make_engine, make_model
from tinyllava_fast.errors import CheckpointError, UserError
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.types import Answer, Request


def free_rows(engine: Engine) -> int:
    """Rows that no sequence holds; those that are kept for later prompts can be had."""
    return engine._decoder.pool.rows.free_rows + engine._core.scheduler.prefixes.num_rows


def finish_all(engine: Engine) -> dict[str, Answer]:
    found: dict[str, Answer] = {}
    while engine.unfinished:
        for answer in engine.step():
            assert answer.id not in found
            found[answer.id] = answer
    assert free_rows(engine) == engine.batch_tokens and engine.step() == []
    return found


def named(requests: list[Request], prefix: str = "good") -> list[Request]:
    return [replace(r, id=f"{prefix}{i}") for i, r in enumerate(requests)]


@pytest.fixture
def good(images: list[Image.Image]) -> list[Request]:
    return named([*mixed_requests(images), ask("say", new=20, temperature=1.0, seed=3)])


@pytest.fixture
def bad(images: list[Image.Image], tmp_path: Path) -> dict[str, Request]:
    """name -> a request of each kind that fails."""
    images[0].save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:99])
    return {
        "too long": ask("x" * 3000),
        "unreadable image": ask("what?", tmp_path / "cut.png"),
        "refused": ask("<image> and <image>, which?", [images[0]]),
        "failed": ask("x" * 1100, new=9),  # fits the context and not the pool
    }


@pytest.fixture
def small(lmm, tokenizer) -> Engine:
    return make_engine(lmm, tokenizer, batch_tokens=900, prefill_tokens=300)


def test_requests_may_be_added_at_any_step(engine, small, good):
    alone = {r.id: a for r, a in zip(good, engine.answers(good), strict=True)}
    found, waiting = {}, list(good)
    while waiting or small.unfinished:
        for request in [waiting.pop(0) for _ in range(min(2, len(waiting)))]:
            small.add_request(request)
        found |= {a.id: a for a in small.step()}
    assert found == alone and free_rows(small) == small.batch_tokens
    assert small.counters.requests == len(good)


def test_what_begins_alike_is_computed_once(engine, images):
    for request in named([ask(q, image) for q in QUESTIONS for image in images[:2]]):
        engine.add_request(request)
    assert len(finish_all(engine)) == 10
    assert engine.counters.images_encoded == 2
    assert engine.counters.computed_tokens < 0.6 * engine.counters.prompt_tokens


def test_bad_ones_fail_alone(engine, small, good, bad):
    """Each with its own error, the others with the answers of a run without them; aborts at random."""
    alone = {r.id: a for r, a in zip(good, engine.answers(good), strict=True)}
    rng = random.Random(0)
    others = [replace(r, id=f"{finish} {i}") for i in range(5) for finish, r in bad.items()]
    aborted = [ask(f"tell me of {i}", new=60, id=f"aborted {i}", eos_token_id=()) for i in range(10)]
    queue = [*good, *others, *aborted]
    rng.shuffle(queue)
    found, left = {}, {r.id for r in aborted}
    while queue or small.unfinished:
        for request in [queue.pop() for _ in range(min(3, len(queue)))]:
            small.add_request(request)
        running = sorted(left & small._added.keys())
        if running and rng.random() < 0.4:
            left.remove(name := rng.choice(running))
            assert small.abort(name)
        found |= {a.id: a for a in small.step()}
    assert {name: found.pop(name) for name in alone} == alone
    for name, answer in found.items():
        finish = name.rpartition(" ")[0]
        if finish == "aborted":
            assert answer.finish in ("aborted", "length")
            continue
        assert (answer.finish, answer.text, answer.tokens, answer.prompt_tokens) == (finish, "", [], 0)
        assert f"request {name!r}" in answer.why
    assert sum(a.finish == "aborted" for a in found.values()) > 3
    assert free_rows(small) == small.batch_tokens


def test_an_error_is_told_at_once(small, bad):
    for request in named([ask(q, new=9, eos_token_id=()) for q in QUESTIONS[:3]]):
        small.add_request(request)
    small.step()
    steps = small.counters.decode_steps
    small.add_request(replace(bad["too long"], id="x"))
    (answer,) = small.step()
    assert answer.id == "x" and small.counters.decode_steps == steps
    assert len(finish_all(small)) == 3


def test_an_abort_frees_its_rows_within_one_step(small, engine):
    """Wherever the request stands: just added, waiting in a group, running."""
    small.add_request(ask("go on", new=200, id="a", eos_token_id=()))
    small.add_request(ask("go on!", new=9, id="b", eos_token_id=()))
    small.step()
    small.step()
    before = free_rows(small)
    small.add_request(ask("more", new=9, id="c"))
    assert small.abort("a") and small.abort("c") and not small.abort("nobody")
    found = {a.id: a for a in small.step()}
    assert {name: a.finish for name, a in found.items()} == {"a": "aborted", "c": "aborted"}
    assert len(found["a"].tokens) == 2 and found["c"].tokens == [] and free_rows(small) > before
    assert finish_all(small)["b"].tokens == engine.answers([ask("go on!", new=9, eos_token_id=())])[0].tokens
    assert not small.abort("a")


def test_a_thousand_aborts_leave_an_empty_pool(small, images):
    rng = random.Random(1)
    for number in range(1000):
        small.add_request(ask(f"{number % 7}?", images[number % 3], new=30, id=str(number), eos_token_id=()))
        if number % 20 == 19:
            small.step()
            for name in rng.sample(sorted(small._added), 19):
                small.abort(name)
            small.step()
    for name in list(small._added):
        small.abort(name)
    assert all(a.finish in ("aborted", "length") for a in finish_all(small).values())
    assert small._core.scheduler.idle and not small._inboxes and not small._images._kept


def test_text_streams_and_callbacks_may_abort_and_fail(small, engine):
    requests = [ask(q, new=12, id=q, eos_token_id=()) for q in QUESTIONS]
    alone = engine.answers(requests)
    pieces: dict[str, str] = {}

    def on_token(name: str, piece: str) -> None:
        pieces[name] = pieces.get(name, "") + piece
        if name == QUESTIONS[0]:
            small.abort(QUESTIONS[1])
        if name == QUESTIONS[2]:
            raise ConnectionError("the client has gone")

    for request in requests:
        small.add_request(request, on_token)
    found = finish_all(small)
    assert found[QUESTIONS[1]].finish == "aborted"
    assert found[QUESTIONS[2]].finish == "failed" and found[QUESTIONS[2]].why == "the client has gone"
    for request, answer in zip(requests, alone, strict=True):
        if request.id not in QUESTIONS[1:3]:
            assert found[request.id].tokens == answer.tokens
            assert found[request.id].text == pieces[request.id] == answer.text


def test_a_run_and_requests_of_step_share_the_engine(engine, small, good):
    alone = {r.id: a for r, a in zip(good, engine.answers(good), strict=True)}
    half = len(good) // 2
    for request in good[:half]:
        small.add_request(request)
    found = {a.id: a for a in small.run(good[half:])}
    assert found.keys() == {r.id for r in good[half:]}
    assert found | finish_all(small) == alone
    small.add_request(good[0])
    next(run := small.run(good[half:]))
    run.close()  # takes its own requests out and no other's
    assert finish_all(small).keys() == {good[0].id}


def test_ids_are_needed_and_unique(engine):
    engine.add_request(ask("what?", id="a"))
    for name in ("", "a"):
        with pytest.raises(UserError, match=f"request id '{name}'"):
            engine.add_request(ask("why?", id=name))
    assert finish_all(engine).keys() == {"a"}
    engine.add_request(ask("what?", id="a"))
    assert finish_all(engine).keys() == {"a"}


def test_a_broken_model_is_raised_and_told_to_each(tokenizer):
    lmm = make_model()
    lmm.llm.lm_head.weight.data[7] = float("nan")
    engine = make_engine(lmm, tokenizer)
    for name in ("a", "b"):
        engine.add_request(ask("what?", id=name))
    found: dict[str, Answer] = {}
    for _ in range(2):  # they begin alike, so the second waits for what it could copy from the first
        with pytest.raises(CheckpointError, match="not finite"):
            engine.step()
        found |= {a.id: a for a in engine.step()}
    assert all(found[name].finish == "failed" and "not finite" in found[name].why for name in ("a", "b"))
