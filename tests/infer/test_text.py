"""Streamed text: whole characters, nothing of a stop text, and together exactly the answer."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.infer.test_engine import QUESTIONS, ask
from tinyllava_fast.infer.text import UNFINISHED, TextStream


@pytest.fixture(scope="module")
def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: word starts are marked, unknown characters are bytes, the text's first space is dropped."""
    vocab = {"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}}
    for word in ("▁", "a", "b", "c", "▁a", "▁b", "▁c", ".", "\n"):
        vocab[word] = len(vocab)
    merges = [("▁", "a"), ("▁", "b"), ("▁", "c")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


TEXTS = ["a b. c", "日本 🙂 a", " a  b ", "ab\n\nc", "", "é", "🙂🙂", "  "]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up(kind, text, tokenizer, pieces_tokenizer):
    tok = tokenizer if kind == "bytes" else pieces_tokenizer
    ids = tok.encode(text, add_special_tokens=False)
    stream = TextStream(tok)
    pieces = [stream.push(i) for i in ids]
    assert not any(UNFINISHED in p for p in pieces)
    pieces.append(stream.close())
    assert "".join(pieces) == stream.text == tok.decode(ids, skip_special_tokens=True).strip() == text.strip()
    if text == "ab\n\nc":
        assert pieces[:2] == ["a", "b"] and pieces[-2:] == ["\n\nc", ""]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_random_bytes_add_up(kind, tokenizer, pieces_tokenizer):
    tok, first = (tokenizer, 4) if kind == "bytes" else (pieces_tokenizer, 1)
    rng = random.Random(0)
    for _ in range(60):
        ids = [first + rng.choice((rng.randrange(256), 0xE6, 0x97, 0xA5, 0x20)) for _ in range(rng.randrange(1, 14))]
        stream = TextStream(tok)
        pieces = [stream.push(i) for i in ids] + [stream.close()]
        assert "".join(pieces) == stream.text
        if kind == "bytes":
            assert stream.text == tok.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("stop", "shown", "stopped"),
    [(["END"], "one EN two", True), (["two", "EN two"], "one", True), (["ENDX", "two!"], "one EN two END", False)],
)
def test_nothing_of_a_stop_text_is_shown(tokenizer, stop, shown, stopped):
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in tokenizer.encode("one EN two END", add_special_tokens=False):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.close())
    assert "".join(pieces) == stream.text == shown and stream.stopped == stopped


def test_engine_streams_and_stops(engine, images):
    requests = [ask(q, images[0], id=f"q{i}") for i, q in enumerate(QUESTIONS)]
    plain = engine.answers(requests)
    heard: dict[str, list[str]] = {r.id: [] for r in requests}
    streamed = engine.answers(requests, on_token=lambda id_, piece: heard[id_].append(piece))
    assert [(a.id, a.tokens, a.text) for a in streamed] == [(a.id, a.tokens, a.text) for a in plain]
    assert {a.id: a.text for a in plain} == {id_: "".join(pieces) for id_, pieces in heard.items()}
    assert sum(len(pieces) > 1 for pieces in heard.values()) >= 3

    long = next(a for a in plain if len(a.text) > 4 and a.text.isprintable())
    (cut,) = engine.answers([ask(QUESTIONS[int(long.id[1])], images[0], stop=[long.text[2:4], "never"])])
    assert cut.finish == "stop" and cut.text == long.text[: long.text.index(long.text[2:4])].strip()
    assert cut.tokens == long.tokens[: len(cut.tokens)] and len(cut.tokens) < len(long.tokens)


def test_end_tokens_of_a_request(engine, images):
    (free,) = engine.answers([ask("what is this?", images[0], eos_token_id=())])
    assert free.finish == "length" and len(free.tokens) == 12
    (ended,) = engine.answers([ask("what is this?", images[0], eos_token_id=[9999, free.tokens[2]])])
    assert ended.finish == "eos" and ended.tokens == free.tokens[: free.tokens.index(free.tokens[2]) + 1]
    (one,) = engine.answers([ask("what is this?", images[0], eos_token_id=free.tokens[0])])
    assert one.tokens == free.tokens[:1] and one.text == ""
