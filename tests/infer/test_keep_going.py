"""What is wrong with one request costs that request: the others are answered as without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.infer.test_engine import ask
from tests.tiny import make_engine, make_model
from tinyllava_fast.errors import CheckpointError, UserError
from tinyllava_fast.infer.types import Request, Sampling

CONTEXT = 400


@pytest.fixture(scope="module")
def short(tokenizer):
    """An engine whose model has a context of 400."""
    return make_engine(make_model(max_position_embeddings=CONTEXT), tokenizer, prefill_tokens=200, compile=False)


@pytest.fixture
def files(tmp_path: Path, images: list[Image.Image]) -> Path:
    images[0].save(tmp_path / "good.png")
    images[1].save(tmp_path / "fine.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:99])
    (tmp_path / "page.png").write_text("<!DOCTYPE html>")
    (tmp_path / "empty.png").write_bytes(b"")
    return tmp_path


def bad_requests(files: Path) -> dict[str, list[Request]]:
    """finish -> requests that end so."""
    good = files / "good.png"
    return {
        "unreadable image": [
            ask("what?", files / "cut.png"),
            ask("why?", files / "cut.png"),
            ask("what?", files / "page.png"),
            ask("what?", files / "empty.png"),
            ask("what?", files / "gone.png"),
            ask("what?", files),
            ask("what?", [good, files / "cut.png"]),
        ],
        "too long": [ask("x" * CONTEXT, good), ask("x" * 5000), ask("x", [good] * 30)],
        "refused": [
            ask("what does <image> mean?"),
            ask("<image> and <image>, which?", [good]),
            ask("<image>, which?", [good, good]),
            ask("half \ud800 of a pair", good),
            ask("\udfff"),
        ],
    }


def test_the_others_are_answered_as_without_them(short, files):
    good = [
        ask(q, i) for i in (files / "good.png", files / "fine.png", None) for q in ("what?", "and why is it so?", "")
    ]
    alone = [a.text for a in short.answers(good)]
    bad = [(r, finish) for finish, requests in bad_requests(files).items() for r in requests]
    mixed: list[tuple[Request, str]] = []
    for number in range(max(len(good), len(bad))):
        mixed += bad[number : number + 1] + [(r, "") for r in good[number : number + 1]]
    queue = [replace(r, id=str(n)) for n, (r, _) in enumerate(mixed)]
    found = {int(a.id): a for a in short.run(iter(queue), keep_going=True)}
    assert sorted(found) == list(range(len(mixed)))
    for number, (_, finish) in enumerate(mixed):
        answer = found[number]
        if finish:
            assert (answer.finish, answer.text, answer.tokens, answer.prompt_tokens) == (finish, "", [], 0), answer
            assert f"request '{number}'" in answer.why
        else:
            assert answer.finish in ("eos", "length") and answer.why == ""
    assert [found[n].text for n, (_, finish) in enumerate(mixed) if not finish] == alone
    assert short._decoder.pool.rows.free_rows == short.batch_tokens


def test_all_of_them_bad(short, files):
    bad = [replace(r, id=f"{f}{n}") for f, rs in bad_requests(files).items() for n, r in enumerate(rs)]
    assert {a.id for a in short.run(bad, keep_going=True)} == {r.id for r in bad}
    assert short._decoder.pool.rows.free_rows == short.batch_tokens


def test_each_alone_still_raises_by_default(short, files):
    for requests in bad_requests(files).values():
        for request in requests:
            with pytest.raises(UserError, match="the question"):
                short.answers([request])


def test_refusals_are_known_beforehand(short, files):
    """All but pictures, which are only decoded when their turn comes."""
    bad = [replace(r, id=f"{f}{n}") for f, rs in bad_requests(files).items() for n, r in enumerate(rs)]
    before = short.counters.computed_tokens
    found = [a.id for a in short.refusals([*bad, ask("fine?", id="fine")])]
    assert sorted(found) == sorted(r.id for r in bad if not r.id.startswith("unreadable"))
    assert short.counters.computed_tokens == before


@pytest.mark.parametrize("room", [60, 100, 256, CONTEXT])
def test_what_surely_fits_is_never_too_long(short, images, room):
    engine = short if room == CONTEXT else make_engine(short.lmm, short.tokenizer, batch_tokens=room)
    found = []
    for size in range(0, 130, 3):
        for shown in (None, images[0], [images[0], images[1]]):
            request = ask("a " * (size // 2), shown, new=8)
            if engine.surely_fits(request):
                found.append(size)
                assert not list(engine.refusals([request]))
    assert not engine.surely_fits(ask("é", new=1)) and not engine.surely_fits(ask("a" * CONTEXT, new=1))
    assert bool(found) == (room > 100)


def test_fewer_tokens_where_the_prompt_fits(short):
    """The answer is the beginning of what a longer context would have given."""
    length = short.answers([ask("x", new=1)])[0].prompt_tokens
    wide = make_engine(make_model(max_position_embeddings=2048), short.tokenizer, compile=False)
    for left in (1, 2, 7, 39, 40, 41):
        request = ask("x" * (CONTEXT - left - length + 1), new=40)
        request = replace(request, sampling=replace(request.sampling, eos_token_id=()))
        (found,) = short.run([request], keep_going=True)
        (whole,) = wide.answers([request])
        assert found.prompt_tokens == CONTEXT - left
        assert found.tokens == whole.tokens[:left] and found.finish == ("length" if left >= 40 else "context")
    (none,) = short.run([ask("x" * (CONTEXT - length + 1), new=40)], keep_going=True)
    assert none.finish == "too long"


def test_an_answer_that_ends_by_itself_is_no_cut_one(short):
    length = short.answers([ask("x", new=1)])[0].prompt_tokens
    request = ask("x" * (CONTEXT - 5 - length + 1), new=40)
    (first,) = short.run([request], keep_going=True)
    ended = replace(request, sampling=Sampling(max_new_tokens=40, eos_token_id=first.tokens[2]))
    (answer,) = short.run([ended], keep_going=True)
    assert answer.finish == "eos" and answer.tokens == first.tokens[: answer.tokens.index(first.tokens[2]) + 1]


def test_a_pool_too_small_is_not_the_requests_fault(short):
    small = make_engine(short.lmm, short.tokenizer, batch_tokens=256)
    for call in (lambda r: small.run(r, keep_going=True), small.refusals):
        with pytest.raises(UserError, match=r"'q': .* exceed the K/V pool; raise it to \d+"):
            list(call([ask("x" * 120, new=9, id="q")]))


def test_numbers_that_are_not_finite_are_not_the_requests_fault(tokenizer):
    lmm = make_model()
    lmm.llm.lm_head.weight.data[7] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        list(make_engine(lmm, tokenizer).run([ask("what?")], keep_going=True))
