"""Benchmarks on a server: the real one answers as the engine does; one that misbehaves costs what it must."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from tests.chat_server import Reply, chat_server
from tests.eval import layouts
from tests.eval.own import answers, finishes, write_data
from tests.serve.conftest import Running
from tinyllava_fast.client.endpoint import Endpoint
from tinyllava_fast.errors import UserError
from tinyllava_fast.eval import answerer, cli, endpoint, runner
from tinyllava_fast.eval.benchmarks.base import Question
from tinyllava_fast.eval.endpoint import EndpointModel
from tinyllava_fast.eval.results import read_verdicts
from tinyllava_fast.infer.assistant import Assistant
from tinyllava_fast.log import log

SUITE = ["gqa", "mmmu", "pope", "sqa", "textvqa"]
FILES = ("verdicts.jsonl", "official/answers.jsonl")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(["--models", f"tiny={folder}"], tmp_path_factory.mktemp("served") / "log")
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = layouts.build_all(tmp_path_factory.mktemp("suite"))
    (root / "gqa/data/images/n1.jpg").write_bytes(b"not an image")
    return root


@pytest.fixture(scope="module")
def command(server: Running, data: Path) -> list[str]:
    """What evaluates the suite on the server, all but --output."""
    url = f"http://127.0.0.1:{server.port}"
    return ["--endpoint", url, "--benchmarks", ",".join(SUITE), "--data", str(data), "--concurrency", "3"]


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the suite on the server."""
    out = tmp_path_factory.mktemp("whole")
    assert cli.main([*command, "--output", str(out)]) == 0
    return out


INSIDE = re.compile(r"[^\n]<image>|<image>[^\n]")


def test_the_server_s_answers_are_the_engine_s(whole, data, folder, tmp_path):
    """But for a picture inside a line, which servers put on a line of its own."""
    local = runner.evaluate(folder, SUITE, data, tmp_path, device="cpu", batch_tokens=4096)
    for name in SUITE:
        ours, theirs = ({v["key"]: v for v in read_verdicts(out / name)} for out in (tmp_path, whole))
        inside = {key for key, v in ours.items() if INSIDE.search(v["prompt"])}
        assert bool(inside) == (name == "mmmu") and ours.keys() == theirs.keys()
        assert {key for key, v in ours.items() if v != theirs[key]} <= inside, name
        found = json.loads((whole / name / "results.json").read_text())
        assert found["model"] == "tiny" and found["endpoint"].endswith("/v1") and "dtype" not in found
        if inside:
            continue
        for field in ("metrics", "tables", "counts", "unreadable_images", "not_answered", "questions"):
            assert found[field] == local[name][field], (name, field)
    run = json.loads((whole / "pope/run.json").read_text())
    assert run["latency"]["count"] == 10 and run["engine"] == {}  # of 12: two are twins
    assert "tiny at http" in (whole / "report.html").read_text()
    assert set(json.loads((whole / "results.json").read_text())["benchmarks"]) == set(SUITE)


def test_kill_and_rerun_give_the_same_files(command, whole, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyllava_fast.eval.cli", *command, "--output", str(tmp_path), "--concurrency", "1"],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    written, deadline = tmp_path / "pope" / "answers.jsonl", time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if written.exists() and written.read_bytes().count(b"\n") >= 5:
            process.kill()
            break
        time.sleep(0.002)
    process.wait()
    assert not (tmp_path / "results.json").exists()
    before = written.read_bytes()
    assert cli.main([*command, "--output", str(tmp_path)]) == 0
    assert written.read_bytes().startswith(before[: before.rfind(b"\n")])
    for name in SUITE:
        for file in (*FILES, "results.json"):
            assert (tmp_path / name / file).read_bytes() == (whole / name / file).read_bytes(), (name, file)


def test_blind_shows_a_blank_picture(command, data, tmp_path):
    assert cli.main([*command, "--benchmarks", "pope", "--blind", "--output", str(tmp_path)]) == 0
    verdicts = read_verdicts(tmp_path / "pope")
    by_prompt: dict[str, set[str | None]] = {}
    for v in verdicts:
        by_prompt.setdefault(v["prompt"], set()).add(v["answer"])
    assert all(len(found) == 1 for found in by_prompt.values())


Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(tmp_path: Path) -> Evaluate:
    """Evaluate the three questions of one's own (out, answers.jsonl of tmp_path) on a server that behaves like this."""
    write_data(tmp_path / "data")

    def asked(behave: Callable[[int, dict[str, Any]], Reply], **options: Any) -> dict[str, Any]:
        with chat_server(behave) as server:
            endpoint = Endpoint(server.url, "tiny", attempts=options.pop("attempts", 2), timeout_s=5)
            model = EndpointModel(endpoint, options.pop("concurrency", 1))
            every = ["custom.max_new_tokens=4"]
            found = runner.evaluate(model, ["custom"], tmp_path / "data", tmp_path / "out", options=every, **options)
        return found["custom"] | {"seen": server.seen}

    return asked


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of a fiftieth."""
    monkeypatch.setattr("tinyllava_fast.client.endpoint.BACKOFF_S", (0.02, 0.1))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    log.addHandler(caplog.handler)
    yield caplog
    log.removeHandler(caplog.handler)


def about(body: dict[str, Any]) -> int:
    """How many pictures a request shows."""
    content = body["messages"][-1]["content"]
    return sum(part["type"] == "image_url" for part in content)


def test_what_is_sent(ask):
    found = ask(lambda number, body: {"say": f" x{number} ", "finish": "length"})
    assert [about(body) for body in found["seen"]] == [1, 2, 1] and found["counts"]["truncated"] == 3
    for body in found["seen"]:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0, 4) and "stream" not in body
    first = found["seen"][0]["messages"]
    assert [part["type"] for part in first[0]["content"]] == ["image_url", "text"] and len(first) == 1
    assert first[0]["content"][0]["image_url"]["url"].startswith("data:image/bmp;base64,")


def test_trouble_is_waited_for(ask, fast, tmp_path):
    trouble: list[Reply] = [
        {"status": 429, "headers": {"Retry-After": "0"}},
        {"status": 500},
        {"raw": b"<html>"},
        {"drop": True},
        {"say": "x", "cut": True},
    ]
    found = ask(lambda number, body: trouble[number] if number < len(trouble) else {"say": "x"}, attempts=6)
    assert len(found["seen"]) == 8 and found["metrics"][0]["value"] == 100
    assert finishes(tmp_path / "out") == {"one": "eos", "two": "eos", "both": "eos"}


@pytest.mark.parametrize(
    ("reply", "finish", "why"),
    [
        ({"status": 400, "raw": b'{"error": {"message": "an image of more than 1 byte"}}'}, "refused", "HTTP 400: an"),
        ({"status": 413}, "refused", "HTTP 413"),
        ({"status": 400, "raw": b'{"error": {"type": "exceed_context_size_error"}}'}, "too long", "HTTP 400"),
        ({"status": 500, "raw": b"cuda error"}, "failed", "no answer after 2 attempts; the last: HTTP 500: cuda error"),
        ({"drop": True}, "failed", "no answer after 2 attempts; the last: RemoteProtocolError"),
        ({"say": "x", "finish": "content_filter"}, "refused", "the server ended its answer with 'content_filter'"),
    ],
    ids=["400", "413", "too long", "500", "drop", "filter"],
)
def test_a_question_that_cannot_be_answered_is_told_and_asked_again(ask, fast, said, tmp_path, reply, finish, why):
    found = ask(lambda number, body: reply if about(body) == 2 else {"say": "x"})
    assert finishes(tmp_path / "out") == {"one": "eos", "two": "eos", "both": finish}
    assert found["counts"][finish] == 1 and found["not_answered"]["both"].startswith(f"question 'both': {why}")
    assert f"scored as an empty answer: question 'both': {why}" in said.text
    again = ask(lambda number, body: {"say": "x"})
    # another port is another server: nothing of the first one's answers is used
    assert len(again["seen"]) == 3 and again["metrics"][0]["value"] == 100 and not again["not_answered"]


def test_what_failed_is_asked_again_and_nothing_else(ask, fast, tmp_path):
    bad = True
    with chat_server(lambda number, body: {"status": 500} if bad and about(body) == 2 else {"say": "x"}) as server:
        for expected in (4, 1, 0):
            model = EndpointModel(Endpoint(server.url, "tiny", attempts=2), 1)
            runner.evaluate(model, ["custom"], tmp_path / "data", tmp_path / "out", options=["custom.max_new_tokens=4"])
            assert len(server.seen) == expected
            server.seen.clear()
            bad = False
    assert answers(tmp_path / "out") == {"one": "x", "two": "x", "both": "x"}


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"status": 401}, "HTTP 401: Unauthorized; give its key by --api-key-env"),
        ({"status": 404}, "HTTP 404: Not Found; check --endpoint and --model"),
        ({"status": 302, "headers": {"Location": "http://x/"}}, "redirects to http://x/, which is not followed"),
        ({"status": 429}, "no reply after 2 attempts; the last: HTTP 429.*the answers so far are kept"),
        ({"status": 500}, "3 questions in a row failed on the server, the last: .*HTTP 500"),
        ({"raw": b"{}"}, "3 questions in a row failed on the server, the last: .*the reply is no chat completion"),
    ],
    ids=["401", "404", "302", "429", "500", "garbage"],
)
def test_a_server_that_answers_nothing_ends_the_run(ask, fast, tmp_path, reply, message):
    with pytest.raises(UserError, match=f"custom: .*{message}"):
        ask(lambda number, body: reply)
    assert not (tmp_path / "out" / "custom" / "results.json").exists()


def counted(finishes: list[str], images: list[tuple[Path, ...]], *, answered: bool = False) -> int:
    """How many replies are told before the server is given up, or all of them."""
    found: SimpleQueue[Any] = SimpleQueue()
    for number, (finish, pictures) in enumerate(zip(finishes, images, strict=True)):
        question = Question(key=str(number), id=number, images=pictures, prompt="?")
        found.put((question, answerer.Reply(key=question.key, text="", finish=finish)))
    told = 0
    try:
        for _ in endpoint._counted(found, len(finishes), answered):
            told += 1
    except UserError:
        return told
    return len(finishes)


def test_many_failures_about_one_picture_are_its_own():
    pictures = [(Path(f"{n}.png"),) for n in range(20)]
    bad, good = ["failed"] * 20, ["eos"]
    assert counted([*good, *bad, *good], [pictures[0], *pictures[:1] * 20, pictures[1]]) == 22
    assert counted([*good, *bad], [pictures[0], *pictures]) == 1 + endpoint.IN_A_ROW
    assert counted(bad, [()] * 20) == endpoint.IN_A_ROW  # without pictures each is by itself


def test_failures_alone_end_a_run_only_where_it_begins():
    assert counted(["failed"], [()], answered=True) == 1
    with pytest.raises(UserError, match="1 questions in a row"):
        found: SimpleQueue[Any] = SimpleQueue()
        found.put((Question(key="a", id="a", prompt="?"), answerer.Reply(key="a", text="", finish="failed")))
        list(endpoint._counted(found, 1, False))


def test_a_server_that_goes_away_ends_the_run_and_what_is_done_stays(ask, fast, tmp_path):
    def behave(number: int, body: dict[str, Any]) -> Reply:
        return {"say": "x"} if number < 2 else {"status": 429}

    with pytest.raises(UserError, match="the answers so far are kept; run the same command again to go on"):
        ask(behave)
    lines = (tmp_path / "out/custom/answers.jsonl").read_text().splitlines()
    assert sum('"answer": "x"' in line for line in lines) == 2


def test_requests_run_side_by_side(ask):
    found = ask(lambda number, body: {"say": "x", "stall": 0.4}, concurrency=3)
    assert found["run"]["eval_seconds"] < 1.1 and found["run"]["latency"]["p50"] >= 0.4


def test_ctrl_c_keeps_what_is_done(tmp_path):
    write_data(tmp_path / "data")
    with chat_server(lambda number, body: {"say": "x", "stall": 60 * (number > 0)}) as server:
        words = ["--endpoint", server.url, "--benchmarks", "custom", "--data", str(tmp_path / "data")]
        process = subprocess.Popen(
            [sys.executable, "-m", "tinyllava_fast.eval.cli", *words, "--output", str(tmp_path), "--concurrency", "1"],
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while len(server.seen) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert process.returncode == 130 and "stopped; the answers so far are kept" in err and "Traceback" not in err
    assert (tmp_path / "custom/answers.jsonl").read_text().count('"answer": "x"') == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "--endpoint", "http://x"], "--endpoint and the model folder m: name one of them"),
        (["--endpoint", "http://x", "--weights", "int8"], "--weights is for a model folder; leave it out"),
        (["m", "--model", "tiny"], "--model is for a server (--endpoint); leave it out"),
        (["--endpoint", "x:1"], "'x:1' is no URL of a server"),
        (["--endpoint", "http://x", "--api-key-env", "NO_SUCH_KEY"], "the variable NO_SUCH_KEY is not set"),
    ],
)
def test_mistakes(words, message, capsys, monkeypatch):
    monkeypatch.setattr(Assistant, "from_pretrained", None)
    assert cli.main([*words, "--benchmarks", "pope", "--data", "d"]) == 2
    assert message in capsys.readouterr().err


def test_results_lie_in_a_folder_of_the_model_s_name():
    model = EndpointModel(Endpoint("http://x/v1", "org/big-7B"))
    assert runner.default_output(model, blind=True) == Path("eval-big-7B-blind")
    other = EndpointModel(Endpoint("http://y/v1", "org/big-7B"))
    assert model.facts["model_digest"] != other.facts["model_digest"]
