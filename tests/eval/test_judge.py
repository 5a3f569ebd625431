"""The judge's client against a real server that answers, fails, stalls and talks rubbish."""

from __future__ import annotations

import json

import pytest

from tests.chat_server import chat_server
from tests.eval import golden
from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.judge import RETRY, Grade, GradeFile, Judge, JudgeError, ask, grade_all, grade_key


def endpoint(url, pauses=None, **options):
    sleep = (lambda s: None) if pauses is None else pauses.append
    return Judge(url, "judge", **{"key": "secret", "timeout_s": 5.0, "sleep": sleep} | options)


@pytest.mark.parametrize("case", golden.load("mm-vet/judge_replies.jsonl"), ids=lambda c: c["case"])
def test_replies_are_read_as_by_the_official_evaluator(case):
    replies = case["replies"]
    with chat_server(lambda number, body: {"say": replies[min(number, len(replies) - 1)]}) as server:
        grade = ask(endpoint(server.url), "the row", "v1_0", 0)
    assert (grade.score, grade.content, grade.model) == (case["score"], case["content_stored"], "judge-1")
    assert len(server.seen) == case["n_calls"] and [b["temperature"] for b in server.seen] == case["temperatures"]
    messages = [b["messages"][0]["content"] for b in server.seen]
    assert [m == f"the row\n{RETRY}" for m in messages] == case["retry_prompt"] and messages[0] == "the row"
    assert {b["max_tokens"] for b in server.seen} == {3} and set(server.keys) == {"Bearer secret"}


@pytest.mark.parametrize("said", ["nan", None, ""])
def test_no_number_is_asked_for_again(said):
    with chat_server(lambda number, body: {"say": said if number == 0 else "0.4"}) as server:
        assert ask(endpoint(server.url, key="", max_tokens=0), "row", "v1_0", 0).score == 0.4
    assert server.keys == [None, None] and "max_tokens" not in server.seen[0]


def test_a_server_in_trouble_is_asked_again():
    trouble = [
        {"status": 500},
        {"status": 429, "headers": {"Retry-After": "17"}},
        {"raw": b"<html>bad gateway</html>"},
        {"raw": b'{"error": "overloaded"}'},
        {"say": "0.9", "cut": True},
        {"say": "0.9", "stall": 0.5},
        {"say": "0.9"},
    ]
    pauses = []
    with chat_server(lambda number, body: trouble[number]) as server:
        assert ask(endpoint(server.url, pauses, attempts=7, timeout_s=0.2), "row", "v1_0", 0).score == 0.9
    assert pauses == [1, 17, 34, 60, 60, 60]


def test_a_server_that_stays_down_or_refuses():
    with chat_server(lambda number, body: {"status": 503, "raw": b"try later"}) as server:
        with pytest.raises(JudgeError, match=r"no reply after 3 attempts; the last: HTTP 503: try later"):
            ask(endpoint(server.url, attempts=3), "row", "v1_0", 0)
        assert len(server.seen) == 3
    with chat_server(lambda number, body: {"status": 401, "raw": b"invalid key"}) as server:
        with pytest.raises(
            JudgeError, match=r"refused the request \(HTTP 401: invalid key\); check the base URL"
        ) as error:
            ask(endpoint(server.url), "row", "v1_0", 0)
        assert len(server.seen) == 1 and "secret" not in str(error.value) + repr(endpoint(server.url))
        url = server.url
    with pytest.raises(JudgeError, match=r"no reply after 2 attempts"):  # nobody listens there any more
        ask(endpoint(url, attempts=2), "row", "v1_0", 0)


def test_grades_are_kept_and_not_asked_for_twice(tmp_path):
    path = tmp_path / "grades.jsonl"
    messages = {f"v1_{i}": f"row {i}" for i in range(6)}
    with chat_server(lambda number, body: {"say": "0.5"} if number < 7 else {"status": 400}) as server:
        file = GradeFile(path)
        with pytest.raises(JudgeError):
            list(grade_all(endpoint(server.url), messages, 2, file, parallel=1))
    first = GradeFile(path).grades
    assert len(first) == 7 and sum(g.run == 0 for g in first.values()) == 6  # a run is completed before the next
    path.write_bytes(path.read_bytes() + b'{"key": "cut of')
    with chat_server(lambda number, body: {"say": "0.8"}) as server:
        file = GradeFile(path)
        again = {**messages, "v1_0": "another answer"}
        assert len(list(grade_all(endpoint(server.url), again, 2, file, parallel=3))) == len(server.seen) == 7
        assert not list(grade_all(endpoint(server.url), again, 2, file)) and len(server.seen) == 7
        assert file.grades[grade_key(endpoint(server.url), "another answer", 0)].score == 0.8
    assert GradeFile(path).grades == file.grades


GRADE = {"key": "k", "id": "v1_0", "run": 0, "model": "m", "content": "1", "score": 1.0}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({**GRADE, "key": 1}, "key: expected text"),
        ({**GRADE, "score": None}, "score: is null"),
        ({**GRADE, "score": "1"}, "score: expected a number of at least 0, got '1'"),
        ({**GRADE, "score": True}, "score: expected a number of at least 0, got true"),
        ({**GRADE, "score": float("nan")}, "score: expected a number"),
        ({**GRADE, "score": 1.5}, "score: expected a number of at most 1, got 1.5"),
        ({**GRADE, "run": -1}, "run: expected a whole number of at least 0"),
        ({**GRADE, "content": ["1"]}, "content: expected text"),
        ([1], "expected a JSON object"),
        (b'{"key": "\xe9"}', "not UTF-8 text"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"key": "k", "key": "k"}', "the field 'key' stands twice"),
    ],
    ids=range(12),
)
def test_a_foreign_grade_file_is_refused(tmp_path, line, said):
    path = tmp_path / "grades.jsonl"
    GradeFile(path).add("k", Grade(**{name: value for name, value in GRADE.items() if name != "key"}))
    assert GradeFile(path).grades["k"].score == 1
    path.write_bytes(path.read_bytes() + (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")
    with pytest.raises(DataError, match=r"grades.jsonl.*line 2.*not a grade; mend the line, or delete") as error:
        GradeFile(path)
    assert said in str(error.value)


RAW = [
    b'{"choices": [{"message": {"content": [{"type": "text", "text": "0.9"}]}}]}',
    b'{"choices": [{"message": {"content": 0.9}}]}',
    b'{"choices": [{"message": {"content": "0.9"}}], "model": 7}',
    b'{"choices": [{"message": null}]}',
    b'{"choices": [{"message": "0.9"}]}',
    b'{"choices": ["0.9"]}',
    b'{"choices": []}',
    b'{"choices": {"a": 1}}',
    b'{"choices": null}',
    b'"0.9"',
    b"null",
    b"\xe9",
    b"[" * 100_000,
    b'{"choices": [{"message": {"content": "\\ud83d"}}]}',
]


@pytest.mark.parametrize("raw", RAW, ids=range(len(RAW)))
def test_a_reply_of_another_kind_is_an_error_and_no_grade(raw):
    with chat_server(lambda number, body: {"raw": raw}) as server:
        with pytest.raises(JudgeError, match=r"after 2 attempts; the last: the reply is no chat completion \("):
            ask(endpoint(server.url, attempts=2), "row", "v1_0", 0)


def test_a_reply_without_content_is_asked_for_again_and_one_without_a_model_has_ours():
    none = b'{"choices": [{"message": {"content": null}}], "model": null}'
    raws = [none, b'{"choices": [{"message": {"content": "0.3"}}]}']
    with chat_server(lambda number, body: {"raw": raws[number]}) as server:
        grade = ask(endpoint(server.url), "row", "v1_0", 0)
    assert (grade.score, grade.model) == (0.3, "judge")
