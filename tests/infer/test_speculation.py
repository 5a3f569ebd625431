"""Steps with guesses give the answers of steps of one, whatever ends them, and take fewer steps."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.infer.test_engine import QUESTIONS, ask
from tests.infer.test_families import make
from tests.lora import write_adapter
from tests.tiny import make_engine, make_model
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.fast_model.prepare import prepare_model
from tinyllava_fast.infer.grammar import Grammar
from tinyllava_fast.infer.live import LiveEngine
from tinyllava_fast.infer.types import Answer, Request
from tinyllava_fast.models.lmm import LMM

PROMPTS = ("say red blue red blue red blue", "the cat sat on the cat sat on the", *QUESTIONS[:2])


def pair(lmm: LMM, tokenizer: Any, *, prepared: bool, **options: Any) -> tuple[Engine, Engine]:
    """The same model without and with guesses."""
    models = [prepare_model(copy.deepcopy(lmm)) if prepared else lmm for _ in range(2)]
    return (
        make_engine(models[0], tokenizer, **options),
        make_engine(models[1], tokenizer, **options, speculate=8),
    )


def same(plain: list[Answer], guessed: list[Answer]) -> None:
    for one, other in zip(plain, guessed, strict=True):
        assert (one.tokens, one.text, one.finish) == (other.tokens, other.text, other.finish)
        assert [p.id for p in one.logprobs] == [p.id for p in other.logprobs]
        assert [p.logprob for p in one.logprobs] == pytest.approx([p.logprob for p in other.logprobs], abs=1e-4)


def told(engine: Engine, request: Request) -> tuple[Answer, str]:
    """The answer, and its pieces put together."""
    pieces: list[str] = []
    (answer,) = engine.answers([request], lambda _, piece: pieces.append(piece))
    return answer, "".join(pieces)


def requests(images: list[Any]) -> list[Request]:
    """Long answers, which repeat themselves sooner or later, and each way to end one."""
    found = [ask(text, image, new=60, eos_token_id=()) for text in PROMPTS for image in (images[0], None)]
    found += [ask(text, new=new) for text in PROMPTS for new in (1, 2, 3, 7, 30)]
    found += [ask(text, new=40, eos_token_id=(), logprobs=3) for text in PROMPTS[:2]]
    found += [ask(PROMPTS[0], new=40, eos_token_id=(), repetition_penalty=1.3)]
    found += [ask(PROMPTS[0], new=20, temperature=1.0, seed=5), ask(PROMPTS[1], new=40, grammar=Grammar.regex("[ab]+"))]
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("prepared", [True, False], ids=["one call a step", "layer by layer"])
def test_answers_are_those_of_steps_of_one(tokenizer, images, seed, prepared):
    plain, guessing = pair(make_model(seed), tokenizer, prepared=prepared)
    for request in requests(images):  # one at a time, which leaves most room for guesses
        same(plain.answers([request]), guessing.answers([request]))
    same(plain.answers(requests(images)), guessing.answers(requests(images)))
    counters = guessing.counters
    assert 0 < counters.right_guesses < counters.guessed_tokens
    assert counters.decode_steps < plain.counters.decode_steps
    assert counters.generated_tokens == plain.counters.generated_tokens
    assert guessing.usage.free_rows == guessing.usage.rows


def test_whatever_ends_an_answer_ends_it_among_guesses(tokenizer):
    """Each token and each text of a repetitive answer as the end of it."""
    plain, guessing = pair(make_model(1), tokenizer, prepared=True)
    whole = plain.answers([ask(PROMPTS[0], new=60, eos_token_id=())])[0]
    ends = [{"eos_token_id": (), "stop_token_ids": (token,)} for token in dict.fromkeys(whole.tokens)]
    ends += [{"eos_token_id": token} for token in dict.fromkeys(whole.tokens[5:])]
    ends += [{"eos_token_id": (), "stop": whole.text[at : at + 3]} for at in range(0, len(whole.text) - 3, 4)]
    for end in ends:
        request = ask(PROMPTS[0], new=60, **end)
        answer, text = told(guessing, request)
        same(plain.answers([request]), [answer])
        assert text == answer.text


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "openelm", "phi"])
def test_other_families(tokenizer, images, name):
    plain, guessing = pair(make(name), tokenizer, prepared=True)
    some = requests(images)[:14]
    same([plain.answer(r) for r in some], [guessing.answer(r) for r in some])
    assert guessing.counters.right_guesses > 0


def test_a_small_pool(lmm, tokenizer, images):
    """Sequences that are sent back and computed anew, and rows that have to be grown."""
    plain, guessing = pair(lmm, tokenizer, prepared=True, batch_tokens=400, prefill_tokens=64)
    some = [replace(r, image=None) for r in requests(images)[:10]]
    same(plain.answers(some), guessing.answers(some))
    assert guessing._decoder.pool.rows.free_rows == 400


def test_with_an_adapter(lmm, tokenizer, tmp_path):
    write_adapter(lmm, tmp_path / "red", seed=3)
    engines = pair(lmm, tokenizer, prepared=True)
    some = [ask(text, new=50, eos_token_id=()) for text in PROMPTS]
    some += [replace(r, adapter="red") for r in some]
    for engine in engines:
        engine.load_adapter("red", tmp_path / "red")
    plain, guessing = engines
    same(plain.answers(some), guessing.answers(some))
    same([plain.answer(r) for r in some], [guessing.answer(r) for r in some])
    assert guessing.counters.right_guesses > 0


def test_streams(lmm, tokenizer, images):
    plain, guessing = pair(lmm, tokenizer, prepared=True)
    live = LiveEngine(guessing)
    try:
        some = requests(images)
        streams = [live.submit(r) for r in some]
        for request, stream in zip(some, streams, strict=True):
            pieces = list(stream)
            answer = stream.result(60)
            same(plain.answers([request]), [answer])
            assert [t for piece in pieces for t in piece.tokens] == answer.tokens
            assert "".join(piece.text for piece in pieces) == answer.text
            assert [p for piece in pieces for p in piece.logprobs] == answer.logprobs
    finally:
        live.close()


def test_aborted_among_guesses(lmm, tokenizer):
    """What ``on_token`` aborts gets no further token, and the others are answered as ever."""
    plain, guessing = pair(lmm, tokenizer, prepared=True)
    for engine in (plain, guessing):
        seen: list[str] = []

        def stop(name: str, piece: str, engine: Engine = engine, seen: list[str] = seen) -> None:
            seen.append(piece)
            if len("".join(seen)) >= 12:
                engine.abort(name)

        engine.add_request(ask(PROMPTS[0], new=60, id="a", eos_token_id=()), stop)
        engine.add_request(ask(PROMPTS[1], new=60, id="b", eos_token_id=()))
        answers = {}
        while engine.unfinished:
            answers |= {answer.id: answer for answer in engine.step()}
        assert answers["a"].finish == "aborted" and answers["a"].text.startswith("".join(seen).rstrip()[:12])
        assert answers["b"] == replace(plain.answer(ask(PROMPTS[1], new=60, eos_token_id=())), id="b")


def test_bfloat16(tokenizer):
    """Answers may differ where two tokens are as likely as rounding tells; each is a token that the model may say."""
    model = make_model(2).to(torch.bfloat16)
    guessing = make_engine(prepare_model(model), tokenizer, speculate=8)
    for text in PROMPTS:
        answer = guessing.answer(ask(text, new=120, eos_token_id=()))
        assert len(answer.tokens) == 120
    assert guessing.counters.right_guesses > 0
