"""Adapters of a real server: each is a model id, and what is answered is what the merged model answers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.lora import write_adapter
from tests.serve.conftest import ROOT, Running
from tests.tiny import make_engine, make_model, make_tokenizer
from tinyllava_fast.infer.types import Request, Sampling

QUESTIONS = ("why?", "what is this?", "say more")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, str]]]:
    """Folder of each adapter, and the merged model's answers."""
    root, lmm, found = tmp_path_factory.mktemp("adapters"), make_model(), {}
    for seed, name in enumerate(("red", "blue", "green")):
        engine = make_engine(write_adapter(lmm, root / name, seed=seed), make_tokenizer())
        found[name] = root / name, {q: answer(engine, q) for q in QUESTIONS}
    return found


def answer(engine: object, question: str) -> str:
    request = Request(messages=[{"from": "human", "value": [question]}], sampling=Sampling(max_new_tokens=4))
    return engine.answers([request])[0].text  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def server(start: Callable[..., Running], folder: Path, merged: dict[str, tuple[Path, dict[str, str]]]) -> Running:
    flags = [part for name, (path, _) in merged.items() for part in ("--adapter", f"{name}@tiny={path}")]
    return start("--models", f"tiny={folder}", f"other={folder}", *flags, "--speculate", "4")


def test_each_is_a_model_and_answers_as_the_merged_one(server, engine, merged):
    expected = {name: answers for name, (_, answers) in merged.items()}
    expected["tiny"] = expected["other"] = {q: answer(engine, q) for q in QUESTIONS}
    asked = [(name, question) for question in QUESTIONS for name in expected] * 3

    def ask(pair: tuple[str, str]) -> str:
        status, body, _ = server.chat(pair[1], model=pair[0])
        assert (status, body["model"]) == (200, pair[0])
        return body["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, asked)) == [expected[name][question] for name, question in asked]
    assert len({texts["why?"] for texts in expected.values()}) == 4


def test_they_are_listed_and_others_are_not_there(server, merged):
    listed = {m["id"]: m.get("parent") for m in server.ask("GET", "/v1/models")[1]["data"]}
    assert listed == {"tiny": None, "other": None, **dict.fromkeys(merged, "tiny")}
    assert server.ask("GET", "/v1/models/red")[1]["parent"] == "tiny"
    status, body, _ = server.chat(model="rad")
    assert status == 404 and body["error"]["code"] == "model_not_found"
    tokens = [
        server.ask("POST", "/tokenize", {"model": name, "prompt": "abc"})[1]["tokens"] for name in ("tiny", "red")
    ]
    assert tokens[0] == tokens[1]
    assert server.ask("GET", "/metrics")[1].decode().count("tlf_pool_rows{") == 2  # an engine is counted once


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("red", "give NAME=FOLDER"),
        ("tiny={red}", "'tiny' is taken"),
        ("red@none={red}", "there is no model 'none'"),
        ("red={red}/none", "no such folder"),
    ],
)
def test_a_mistake_ends_the_start(folder, merged, given, said):
    given = given.format(red=merged["red"][0])
    command = [sys.executable, "-m", "tinyllava_fast.serve.cli", "--models", f"tiny={folder}", "--adapter", given]
    done = subprocess.run([*command, "--port", "0", "--device", "cpu"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
