"""An engine in a thread: streams, refusals, aborts from anywhere, and answers as of a run alone."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.infer.test_engine import QUESTIONS, ask, mixed_requests
from tests.tiny import make_engine, make_model
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.live import LiveEngine, QueueFullError, StoppedError, Stream
from tinyllava_fast.infer.types import Answer, Request
from tinyllava_fast.log import log


@pytest.fixture
def live(lmm, tokenizer) -> Iterator[LiveEngine]:
    live = LiveEngine(make_engine(lmm, tokenizer, batch_tokens=1600, prefill_tokens=300))
    yield live
    live.close()
    assert not [t for t in threading.enumerate() if t.name in ("tlf-engine", "tlf-prepare_0")]


def read(stream: Stream) -> tuple[str, list[int], Answer]:
    pieces = list(stream)
    return "".join(p.text for p in pieces), [t for p in pieces for t in p.tokens], stream.result(0)


async def read_async(stream: Stream) -> tuple[str, list[int], Answer]:
    pieces = [piece async for piece in stream]
    return "".join(p.text for p in pieces), [t for p in pieces for t in p.tokens], await stream.answer()


@pytest.fixture
def good(images: list[Image.Image]) -> list[Request]:
    return [*mixed_requests(images), ask("say", new=20, temperature=1.0, seed=3)]


def test_streams_equal_a_run_alone(live, engine, good):
    alone = engine.answers(good)
    found = [read(stream) for stream in [live.submit(request) for request in good]]
    assert [answer for *_, answer in found] == alone
    assert [(text, tokens) for text, tokens, _ in found] == [(a.text, a.tokens) for a in alone]

    async def together() -> list[tuple[str, list[int], Answer]]:
        return await asyncio.gather(*(read_async(live.submit(request)) for request in good))

    assert asyncio.run(together()) == found
    stats = live.stats()
    assert stats.running == stats.waiting == stats.pool_used_rows == 0
    assert stats.requests == 2 * len(good) and 0 < stats.reused_tokens < stats.prompt_tokens


def test_bad_ones_and_aborts_cost_the_others_nothing(live, engine, good, images, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n")
    bad = {
        "too long": ask("x" * 3000),
        "unreadable image": ask("what?", tmp_path / "cut.png"),
        "refused": ask("<image> and <image>, which?", [images[0]]),
        "failed": ask("x" * 1700, new=9),
    }
    rng = random.Random(0)
    queue = [*(("good", r) for r in good * 3), *(item for item in bad.items() for _ in range(5))]
    queue += [("aborted", ask(f"tell me of {i}", new=60, eos_token_id=())) for i in range(10)]
    rng.shuffle(queue)
    streams = [(kind, live.submit(request)) for kind, request in queue]
    for kind, stream in streams:
        if kind == "aborted":
            threading.Timer(rng.random() * 0.2, stream.abort).start()
    alone = dict(zip(map(id, good), engine.answers(good), strict=True))
    for kind, stream in streams:
        answer = stream.result(60)
        if kind == "good":
            assert answer == alone[id(stream.request)]
        elif kind == "aborted":
            assert answer.finish in ("aborted", "length")
        else:
            assert (answer.finish, answer.text, answer.tokens) == (kind, "", []) and answer.why


def test_a_thousand_aborts_leave_nothing(live, images):
    rng = random.Random(1)
    streams = []
    for number in range(1000):
        while True:
            try:
                streams.append(live.submit(ask(f"{number % 7}?", images[number % 3], new=30, eos_token_id=())))
                break
            except QueueFullError:
                rng.choice(streams).abort()
        streams[rng.randrange(len(streams))].abort()
    for stream in streams:
        stream.abort()
    assert {s.result(60).finish for s in streams} <= {"aborted", "length"}
    stats = live.stats()
    assert stats.running == stats.waiting == stats.pool_used_rows == 0 and not live._open


def test_a_second_question_computes_only_what_is_new(live, images):
    first = live.submit(ask("what is this?", images[0], new=8, eos_token_id=())).result(60)
    assert first.cached_tokens == 0
    again = live.submit(ask("what is that?", images[0].copy(), new=8, eos_token_id=())).result(60)
    assert again.cached_tokens > 0.8 * again.prompt_tokens  # all but the end of the question
    turns = [
        {"from": "human", "value": "what is this?"},
        {"from": "gpt", "value": first.text},
        {"from": "human", "value": "and?"},
    ]
    request = replace(ask("", images[0], new=8), messages=turns)
    second = live.submit(request).result(60)
    assert second.cached_tokens >= first.prompt_tokens
    assert live.engine.counters.images_encoded == 1
    other = live.submit(ask("what is this?", images[1], new=8)).result(60)
    assert 0 < other.cached_tokens < again.cached_tokens - 4  # what stands before the image


def test_sixteen_questions_about_an_image_run_the_tower_once(live, engine, images, monkeypatch):
    """They arrive while the first ones are answered, each with a copy of the picture; its rows are held once."""
    shown = []
    encode = live.engine.lmm.encode_images
    monkeypatch.setattr(live.engine.lmm, "encode_images", lambda pixels: shown.append(len(pixels)) or encode(pixels))
    asked = [ask(f"question {number}: what is this?", images[0].copy(), new=8, eos_token_id=()) for number in range(16)]
    streams = []
    for request in asked:
        streams.append(live.submit(request))
        time.sleep(0.02)
    answers = [stream.result(60) for stream in streams]
    assert shown == [1] and live.engine.counters.images_encoded == 1
    assert [a.tokens for a in answers] == [a.tokens for a in engine.answers(asked)]
    begin = engine.lmm.tokens_per_image
    assert all(a.cached_tokens >= begin for a in answers[1:])


def test_a_full_queue_and_a_closed_engine_refuse(lmm, tokenizer):
    live = LiveEngine(make_engine(lmm, tokenizer), max_waiting=2)
    running = live.submit(ask("go on", new=400, eos_token_id=()))
    streams = []
    with pytest.raises(QueueFullError, match="2 requests wait"):
        for _ in range(50):
            streams.append(live.submit(ask("and?", new=400, eos_token_id=())))
    closing = threading.Thread(target=live.close, kwargs={"drain": 0.2})
    closing.start()
    while not live._closing:
        pass
    with pytest.raises(StoppedError):
        live.submit(ask("too late"))
    closing.join(30)
    assert not closing.is_alive()
    assert all(s.result(0).finish in ("aborted", "length") for s in [running, *streams])


def test_close_lets_what_runs_finish(lmm, tokenizer):
    live = LiveEngine(make_engine(lmm, tokenizer))
    streams = [live.submit(ask(q, new=9, eos_token_id=())) for q in QUESTIONS]
    live.close(drain=60)
    assert [s.result(0).finish for s in streams] == ["length"] * len(streams)


def test_a_broken_model_is_told_to_each(tokenizer):
    lmm = make_model()
    lmm.llm.lm_head.weight.data[7] = float("nan")
    live = LiveEngine(make_engine(lmm, tokenizer))
    for question in QUESTIONS:
        answer = live.submit(ask(question)).result(30)
        assert answer.finish == "failed" and "not finite" in answer.why
    live.close()


def test_readers_may_leave(live):
    async def first_piece() -> None:
        stream = live.submit(ask("go on", new=300, eos_token_id=()))
        async for _ in stream:
            break
        task = asyncio.create_task(stream.answer())
        await asyncio.sleep(0.01)
        task.cancel()
        stream.abort()

    asyncio.run(first_piece())
    assert live.submit(ask("still there?", new=3)).result(30).tokens


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_prompt_in_chunks_gives_the_same_answer(lmm, tokenizer, engine, images, tmp_path: Path, chunk: int):
    long = ask("so " * 150 + "what?", images[0], new=12, eos_token_id=())
    several = ask("<image> or <image>?", images[:2], new=12, eos_token_id=())
    alone = engine.answers([long, several])
    small: Engine = make_engine(lmm, tokenizer, chunk_tokens=chunk)
    small.add_request(replace(ask("go on", new=1000, eos_token_id=()), id="runs"))
    small.step()
    small.add_request(replace(long, id="long"))
    small.add_request(replace(several, id="several"))
    found: dict[str, Answer] = {}
    while not {"long", "several"} <= found.keys():
        before = len(small._added["runs"].tokens)
        found |= {a.id: a for a in [*small.step(), *small.step()]}
        assert len(small._added["runs"].tokens) > before  # never two passes in a row without a token for it
    assert [found["long"].tokens, found["several"].tokens] == [a.tokens for a in alone]


def test_a_picture_that_is_named_many_times_is_decoded_once(live, engine, images, monkeypatch):
    decoded = []
    decode = live.engine._images.decode
    monkeypatch.setattr(live.engine._images, "decode", lambda image: decoded.append(image) or decode(image))
    request = ask("<image> or <image> or <image>?", [images[0], images[1], images[0]], new=6)
    assert live.submit(request).result(60).tokens == engine.answers([request])[0].tokens
    assert decoded == images[:2]


def test_choices_of_one_question_are_decoded_once(live, engine, images, monkeypatch):
    decoded = []
    decode = live.engine._images.decode
    monkeypatch.setattr(live.engine._images, "decode", lambda image: decoded.append(image) or decode(image))
    held = hold_the_preparer(live)
    picture = images[0].copy()
    choices = [ask("what is it?", picture, new=6, temperature=1.0, seed=seed) for seed in range(4)]
    streams = [live.submit(choice) for choice in choices]
    held.set()
    answers = [stream.result(60) for stream in streams]
    assert len(decoded) == 1 and [a.tokens for a in answers] == [engine.answers([c])[0].tokens for c in choices]
    picture.paste((0, 0, 0), (0, 0, *picture.size))  # the others are answered, so it is looked at again
    del streams
    assert live.submit(choices[0]).result(60).tokens == engine.answers([choices[0]])[0].tokens and len(decoded) == 2


def hold_the_preparer(live: LiveEngine) -> threading.Event:
    """Let requests wait for the preparing thread until the event is set."""
    held = threading.Event()
    live._preparer.submit(held.wait)
    return held


def test_an_aborted_request_lets_go_of_its_pictures_while_it_waits(live, images):
    held = hold_the_preparer(live)
    picture = images[0].copy()
    gone = weakref.ref(picture)
    stream = live.submit(ask("what?", picture))
    del picture
    assert gone() is not None
    stream.abort()
    assert gone() is None
    held.set()
    assert stream.result(30).finish == "aborted"


def test_close_decodes_nothing_that_waits(lmm, tokenizer, images, monkeypatch):
    live = LiveEngine(make_engine(lmm, tokenizer))
    decoded: list[object] = []
    monkeypatch.setattr(live.engine._images, "decode", decoded.append)
    held = hold_the_preparer(live)
    streams = [live.submit(ask("what?", images[0])) for _ in range(5)]
    threading.Timer(0.3, held.set).start()
    live.close()
    assert [stream.result(0).finish for stream in streams] == ["aborted"] * 5 and not decoded


def test_no_more_wait_than_may(lmm, tokenizer):
    """However fast they come, and wherever they are on their way."""
    live = LiveEngine(make_engine(lmm, tokenizer, batch_tokens=300), max_waiting=3)
    most, streams = 0, []
    for _ in range(3000):
        try:
            streams.append(live.submit(ask("go on", new=200, eos_token_id=())))
        except QueueFullError:
            pass
        most = max(most, live.stats().waiting)
    for stream in streams:
        stream.abort()
    live.close()
    assert most == 3


@pytest.mark.parametrize("place", ["schedule", "collect"])
def test_a_fault_outside_a_pass_is_told_to_each(lmm, tokenizer, monkeypatch, caplog, place):
    """Also one that comes again and again. The log tells where it was, not what it says."""
    live = LiveEngine(make_engine(lmm, tokenizer))
    monkeypatch.setattr(log, "propagate", True)

    def broken() -> None:
        raise RuntimeError("a secret")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(live.engine._core.scheduler, place, broken)
        answers = [stream.result(30) for stream in [live.submit(ask(q)) for q in QUESTIONS]]
        assert {(a.finish, a.why, a.text) for a in answers} == {("failed", "a secret", "")}
    assert len(caplog.records) <= 3 * len(QUESTIONS)
    assert "RuntimeError at test_live_engine.py:" in caplog.text and "a secret" not in caplog.text
    assert live.submit(ask("still there?", new=3)).result(30).tokens
    live.close()


def test_an_answer_that_cannot_be_told_costs_no_other(live, monkeypatch):
    decode = live.engine.tokenizer.decode
    monkeypatch.setattr(live, "_on_text", None)  # no text before the end

    def picky(ids: list[int], **options: object) -> object:
        if len(ids) == 5:
            raise ValueError("five")
        return decode(ids, **options)

    monkeypatch.setattr(live.engine.tokenizer, "decode", picky)
    streams = [live.submit(ask("go on", new=new, eos_token_id=())) for new in (4, 5, 6, 5, 4)]
    assert [s.result(30).finish for s in streams] == ["length", "failed", "length", "failed", "length"]
