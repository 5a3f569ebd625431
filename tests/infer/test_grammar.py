"""Structured output: every answer that ends is of its grammar, whatever the model says, and a bad grammar says so."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest

from tests.infer.test_engine import ask
from tests.tiny import make_engine
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.grammar import MOST_CHARACTERS, MOST_COMPILED, Compiler, Grammar
from tinyllava_fast.infer.scheduling import scheduler
from tinyllava_fast.infer.scheduling.admission import requeue
from tinyllava_fast.infer.types import Request

pytest.importorskip("llguidance")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["red", "green", None]}, "maxItems": 3},
        "box": {
            "type": "object",
            "properties": {"wide": {"type": "boolean"}},
            "required": ["wide"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
}
OPTIONS = ["yes", 'no, "never" \\ /', "é\n☃", "yes, but"]
RECURSIVE = {"$defs": {"n": {"$ref": "#/$defs/n"}}, "$ref": "#/$defs/n"}
ENDLESS = {"type": "array", "minItems": 1, "items": {"$ref": "#"}}


def form(grammar: Grammar, i: int = 0, new: int = 400, **settings: Any) -> Request:
    return ask(f"question {i}", new=new, grammar=grammar, seed=i, id=str(i), **settings)


def check(value: Any) -> None:
    """That a decoded answer is of SCHEMA."""
    assert isinstance(value, dict) and {"name", "count", "tags"} <= set(value) <= {"name", "count", "tags", "box"}
    assert isinstance(value["name"], str) and 1 <= len(value["name"]) <= 12
    assert type(value["count"]) is int and 0 <= value["count"] <= 999
    assert len(value["tags"]) <= 3 and set(value["tags"]) <= {"red", "green", None}
    assert "box" not in value or (list(value["box"]) == ["wide"] and type(value["box"]["wide"]) is bool)


def test_answers_of_an_untrained_model_are_of_their_schema(engine):
    grammar = Grammar.json_schema(json.dumps(SCHEMA))
    requests = [form(grammar, i, temperature=1.5 * (i % 2)) for i in range(100)]
    beside = ask("what is this?", id="beside", new=30, temperature=1.0, seed=5)
    answers = engine.answers([*requests, beside])
    assert {a.finish for a in answers[:100]} <= {"stop", "eos"}
    for answer in answers[:100]:
        check(json.loads(answer.text))
    assert len({a.text for a in answers[:100]}) > 50
    assert engine.answers([beside])[0].tokens == answers[100].tokens


def test_text_streamed_is_the_answer(engine):
    pieces: list[str] = []
    (answer,) = engine.answers([form(Grammar.json_schema(SCHEMA))], lambda _, piece: pieces.append(piece))
    assert "".join(pieces) == answer.text
    check(json.loads(answer.text))


def test_choices_and_expressions(engine):
    said = engine.answers([form(Grammar.choice(OPTIONS), i, temperature=1.5) for i in range(40)])
    assert {a.text for a in said} == set(OPTIONS)
    pattern = r"\d{3}-[a-c]{2,4}/\"x(y|z)?"
    matched = engine.answers([form(Grammar.regex(pattern), i, temperature=1.5) for i in range(20)])
    assert all(re.fullmatch(pattern, a.text, re.ASCII) for a in matched) and len({a.text for a in matched}) > 10


def test_an_answer_ends_where_its_grammar_is_complete(engine):
    (answer,) = engine.answers([form(Grammar.choice(["a"]), eos_token_id=(), logprobs=1)])
    assert (answer.text, answer.finish) == ("a", "stop") and len(answer.logprobs) == len(answer.tokens) <= 2
    (cut,) = engine.answers([form(Grammar.regex("[ab]{30}"), new=10)])
    assert cut.finish == "length" and re.fullmatch("[ab]{9,10}", cut.text)
    (whole,) = engine.answers([form(Grammar.regex("x{10}"), new=11, stop="xxxx")])
    assert (whole.text, whole.finish) == ("", "stop")


def test_an_end_token_comes_only_where_the_grammar_is_complete(engine):
    (answer,) = engine.answers([form(Grammar.regex("[ab]{3,}"), logit_bias={2: 100.0})])
    assert answer.finish == "eos" and answer.tokens[-1] == 2 and re.fullmatch("[ab]{3}", answer.text)
    stop = engine.tokenizer.convert_tokens_to_ids("b")  # now an end like any other
    (other,) = engine.answers([form(Grammar.regex("[ab]{3,}"), stop_token_ids=[stop], logit_bias={stop: 100.0})])
    assert (other.text, other.finish, other.tokens[-1]) == ("aaa", "stop", stop)
    (free,) = engine.answers([form(Grammar.regex("[ab]{3,}"), new=50, eos_token_id=(), logit_bias={2: 100.0})])
    assert free.finish == "length" and 2 not in free.tokens


def test_an_object_of_any_kind(engine):
    brace = engine.tokenizer.convert_tokens_to_ids("}")
    (answer,) = engine.answers([form(Grammar.json_object(), logit_bias={brace: 100.0})])
    assert json.loads(answer.text) == {} and answer.finish == "stop"


def test_sequences_that_start_anew_say_the_same(lmm, tokenizer, engine, monkeypatch):
    requests = [form(Grammar.json_schema(SCHEMA), i, new=80, temperature=1.0) for i in range(6)]
    once = [a.tokens for a in engine.answers(requests)]
    anew: list[object] = []
    monkeypatch.setattr(scheduler, "requeue", lambda some, rows: anew.extend(some) or requeue(some, rows))
    assert [a.tokens for a in make_engine(lmm, tokenizer, batch_tokens=560).answers(requests)] == once
    assert anew  # the pool is so small that some have to


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Grammar.json_schema({"type": "strnig"}), "json schema: Invalid type: strnig"),
        (lambda: Grammar.json_schema({"not": {"type": "string"}}), "json schema: Unimplemented keys"),
        (lambda: Grammar.json_schema({"type": "string", "minLength": 3, "maxLength": 1}), "json schema: Unsatisfiable"),
        (lambda: Grammar.json_schema({"$ref": "http://127.0.0.1/x"}), "json schema: Resource"),
        (lambda: Grammar.json_schema({"$ref": "file:///etc/passwd"}), "json schema: Resource"),
        (lambda: Grammar.json_schema({"type": "string", "pattern": "(a"}), "json schema: unclosed group"),
        (lambda: Grammar.json_schema(RECURSIVE), "json schema: no text meets it"),
        (lambda: Grammar.regex("(a+"), "regex: unclosed group"),
        (lambda: Grammar.regex("(?=a)b"), "regex: look-around, .* is not supported"),
        (lambda: Grammar.regex(r"(a)\1"), "regex: backreferences are not supported"),
        (lambda: Grammar.regex("(" * 9000 + "a" + ")" * 9000), "regex: exceed the maximum"),
        (lambda: Grammar.regex(r"[^\s\S]"), "regex: no text meets it"),
        (lambda: Grammar.regex(""), "regex: no text but the empty one meets it"),
    ],
)
def test_a_grammar_that_cannot_be_compiled(engine, make, said):
    good, bad = form(Grammar.choice(["a"]), 0), form(make(), 1)
    answers = list(engine.run([good, bad], keep_going=True))
    refused = next(a for a in answers if a.id == "1")
    assert refused.finish == "refused" and refused.tokens == [] and re.match(f"request '1': {said}", refused.why)
    assert next(a for a in answers if a.id == "0").text == "a"
    with pytest.raises(UserError, match=said):
        engine.answers([bad])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Grammar.json_schema("{"), "json schema: not JSON"),
        (lambda: Grammar.json_schema('{"a": 1, "a": 2}'), "json schema: the field 'a' stands twice"),
        (lambda: Grammar.json_schema("[]"), "json schema: expected an object"),
        (lambda: Grammar.json_schema({"const": float("nan")}), "json schema: not JSON"),
        (lambda: Grammar.json_schema({"const": {1, 2}}), "json schema: not JSON"),
        (lambda: Grammar.json_schema('{"a":' * 40 + "1" + "}" * 40), "json schema: it is nested deeper than 32"),
        (lambda: Grammar.json_schema('{"a":' * 12000), "json schema: "),
        (lambda: Grammar.json_schema({"enum": [f"value {i}" for i in range(10**6)]}), "json schema: it has "),
        (lambda: Grammar.json_schema("{" + " " * MOST_CHARACTERS + "}"), "json schema: it has "),
        (lambda: Grammar.regex("a" * (MOST_CHARACTERS + 1)), "regex: it has "),
        (lambda: Grammar.regex("\ud800"), "regex: .* is no text"),
        (lambda: Grammar.regex(5), "regex: 5 is no text"),  # type: ignore[arg-type]
        (lambda: Grammar.choice([]), "choice: expected a list of texts"),
        (lambda: Grammar.choice(["a", ""]), "choice: expected a list of texts"),
        (lambda: Grammar.choice("ab"), "choice: expected a list of texts"),
    ],
)
def test_what_is_no_grammar(make, said):
    with pytest.raises(UserError, match=said):
        make()


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar.regex("a{1000000000}"),
        Grammar.regex("((a{1000}){1000}){1000}"),
        Grammar.regex("(a+)+b"),
        Grammar.regex("(a|b)*a(a|b){3000}"),
        Grammar.json_schema(ENDLESS),
        Grammar.json_schema({"type": "array", "items": {"const": 1}, "minItems": 10**7}),
        Grammar.json_schema({"type": "string", "pattern": "^(.*a){20}.*$", "maxLength": 10000}),
        Grammar.json_schema({"type": "string", "pattern": "(a+)+$"}),
        Grammar.json_schema({"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(1500)}}),
    ],
)
def test_a_grammar_without_end_takes_no_time_without_end(engine, grammar):
    """It is cut by max_new_tokens, or refused; the request beside it is answered."""
    start = time.monotonic()
    answers = {a.id: a for a in engine.run([form(grammar, 0, new=30), form(Grammar.choice(["a"]), 1)], keep_going=True)}
    assert time.monotonic() - start < 20  # seconds; on an idle machine it is a fraction of one
    assert answers["1"].text == "a"
    assert answers["0"].finish in ("length", "stop", "refused")
    if answers["0"].finish == "refused":
        assert answers["0"].why.startswith("request '0': the grammar cannot be followed any further: ")


def test_a_grammar_is_compiled_once(tokenizer, monkeypatch):
    compiler = Compiler(tokenizer, 260)
    compiled: list[Grammar] = []
    compile_one = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda grammar: compiled.append(grammar) or compile_one(grammar))
    first, second = (compiler.start(Grammar.choice(["ab"]), [2]) for _ in range(2))
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert (first.push(a), first.push(b), second.push(a), second.push(b)) == (False, True, False, True)
    for i in range(MOST_COMPILED):
        compiler.start(Grammar.choice([f"x{i}"]), [2])
    compiler.start(Grammar.choice(["ab"]), [2])
    assert len(compiled) == MOST_COMPILED + 2  # the first one was the oldest and had gone
