"""Tokens of prompts that ride in steps of decoding: counted passes, and answers as of a run alone."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from tests.infer.test_engine import ask
from tests.tiny import make_engine, make_model
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.fast_model.prepare import prepare_model
from tinyllava_fast.infer.types import Answer, Request
from tinyllava_fast.log import log
from tinyllava_fast.models.lmm import LMM


def with_eight_running(engine: Engine) -> list[str]:
    names = [f"runs {number}" for number in range(8)]
    for number, name in enumerate(names):
        engine.add_request(ask(f"{number}{'abcdefgh'[number]} go on", new=1000, id=name, eos_token_id=()))
    while not all(engine._added[name].decodes for name in names):
        engine.step()
    return names


def passes_of(engine: Engine, newcomer: Request, names: list[str]) -> tuple[list[int], Answer]:
    """Let a newcomer in; tokens of each pass until its first one, during which all others go on, and its answer."""
    engine.add_request(newcomer)
    tokens: list[int] = []
    while not engine._added[newcomer.id].tokens:
        counters = engine.counters
        before = [len(engine._added[name].tokens) for name in names]
        engine.step()
        assert [len(engine._added[name].tokens) for name in names] == [n + 1 for n in before]
        assert engine.counters.decode_steps == counters.decode_steps + 1
        tokens.append(engine.counters.computed_tokens - counters.computed_tokens)
    found: list[Answer] = []
    while not found:
        found = [a for a in engine.step() if a.id == newcomer.id]
    return tokens, found[0]


@pytest.mark.parametrize("ready", [False, True], ids=["torch", "one call a step"])
def test_a_long_prompt_never_takes_a_pass_from_those_that_run(tokenizer: PreTrainedTokenizerFast, ready: bool) -> None:
    """One pass a step, each with a token for all eight and as many of the newcomer's as are allowed."""
    engine, alone = (
        make_engine(
            prepare_model(make_model()) if ready else make_model(), tokenizer, batch_tokens=8192, chunk_tokens=8
        )
        for _ in range(2)
    )
    newcomer = ask("tell me " * 62 + "all", new=12, id="new", eos_token_id=())
    (expected,) = alone.answers([newcomer])
    assert expected.prompt_tokens > 500
    names = with_eight_running(engine)
    tokens, answer = passes_of(engine, newcomer, names)
    left = expected.prompt_tokens - answer.cached_tokens
    assert answer.tokens == expected.tokens
    assert tokens == [16] * (left // 8) + ([8 + left % 8] if left % 8 else [])


def test_images_ride_too(
    lmm: LMM, tokenizer: PreTrainedTokenizerFast, images: list[Image.Image], engine: Engine
) -> None:
    newcomer = ask("<image> or <image>?", images[:2], new=12, id="new", eos_token_id=())
    riding = make_engine(lmm, tokenizer, chunk_tokens=5)
    tokens, answer = passes_of(riding, newcomer, with_eight_running(riding))
    assert answer.tokens == engine.answers([newcomer])[0].tokens and set(tokens[:-1]) == {13}


def test_measured_times_choose_how_many_ride(lmm: LMM, tokenizer: PreTrainedTokenizerFast, engine: Engine) -> None:
    newcomer = ask("so " * 200 + "what?", new=12, id="new", eos_token_id=())
    riding = make_engine(lmm, tokenizer)
    tokens, answer = passes_of(riding, newcomer, with_eight_running(riding))
    assert answer.tokens == engine.answers([newcomer])[0].tokens
    assert (
        all(8 <= n <= 40 for n in tokens)
        and sum(tokens) - 8 * len(tokens) == answer.prompt_tokens - answer.cached_tokens
    )


def test_out_of_memory_ends_the_ride(
    lmm: LMM,
    tokenizer: PreTrainedTokenizerFast,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    newcomer = ask("so " * 60 + "what?", new=12, id="new", eos_token_id=())
    riding = make_engine(lmm, tokenizer, chunk_tokens=8)
    with_eight_running(riding)

    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(riding._decoder, "step_with_riders", refuse)
    monkeypatch.setattr(log, "propagate", True)
    riding.add_request(newcomer)
    found: dict[str, Answer] = {}
    with caplog.at_level(logging.WARNING):
        while "new" not in found:
            found |= {a.id: a for a in riding.step()}
    assert "do not ride any more" in caplog.text
    assert found["new"].tokens == engine.answers([replace(newcomer, id="")])[0].tokens
