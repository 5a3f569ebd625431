"""How a server starts, is told to end, and what it says to ways that cannot work: exit code 2 and a remedy."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tinyllava_fast
from tests.serve.conftest import ROOT, Running
from tests.tiny import make_model, make_tokenizer, tiny_config
from tinyllava_fast.data.templates import tokenizer as own_template
from tinyllava_fast.models.build import build_image_processor
from tinyllava_fast.models.io import save_model
from tinyllava_fast.serve.cli import main
from tinyllava_fast.serve.server import bound, listen

HAS_IPV6 = Path("/proc/net/if_inet6").is_file() and "00000001 " in Path("/proc/net/if_inet6").read_text()


@pytest.fixture(autouse=True)
def hangups_end_a_process() -> Iterator[None]:
    """The suite may run under nohup, whose children ignore SIGHUP as they should."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What tlf-serve writes before it gives up."""
    try:
        code: Any = main([*arguments, "--device", "cpu"])
    except SystemExit as exit:
        code = exit.code
    found = capsys.readouterr().err
    assert code == 2 and "Traceback" not in found
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "--port 99999: bind(): port must be 0-65535.; name another one"),
        (["--port", "-1"], "--port -1: bind(): port must be 0-65535.; name another one"),
        (["--port", "http"], "invalid int value: 'http'"),
        (["--host", "300.300.300.300", "--no-auth"], "--host 300.300.300.300 --port 8000: "),
        (["--host", "x" * 70, "--no-auth"], "name another one"),
        (["--host", "192.0.2.7", "--no-auth"], "Cannot assign requested address; name another one"),
        (["--media-path", "{folder}/none"], "none: no such folder"),
        (["--host-name", "gpu1.example.org:8000"], "--host-name gpu1.example.org:8000: expected a name alone"),
        (["--host-name", "https://a.example"], "without http:// and port"),
        (["--models", "={folder}"], "a model without a name; write NAME=FOLDER"),
        (["--models", "a={folder}", "a={folder}"], "two models are called 'a'"),
        (["--max-memory-mb", "0"], "--max-memory-mb: '0' is not a positive whole number"),
        (["--device", "npu"], "device: 'npu'; known: auto, cpu, cuda"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_flags_that_cannot_work(capsys, folder, arguments, message):
    first = [] if "--models" in arguments else [str(folder)]
    port = [] if "--port" in arguments or message.startswith("--host") else ["--port", "0"]
    code = "cpu" if "--device" in arguments else ""
    given = [argument.format(folder=folder) for argument in arguments]
    if code:  # the last one counts
        assert main([*first, *port, *given]) == 2
        assert message in capsys.readouterr().err
    else:
        assert message in said(capsys, *first, *port, *given)


def test_a_port_that_is_taken(capsys, folder, listener):
    port = listener.getsockname()[1]
    assert "Address already in use; name another one" in said(capsys, str(folder), "--port", str(port))
    with bound("127.0.0.1", 0) as one, bound("127.0.0.1", one.getsockname()[1]) as other:  # both still load a model
        listen(one)
        with pytest.raises(ValueError, match="Address already in use; name another one"):
            listen(other)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def hostile(folder: Path, how: str, mark: Path) -> None:
    """Make a model folder dangerous. mark: what would be there if its code had run."""
    weights = folder / "model.safetensors"
    match how:
        case "empty":
            shutil.rmtree(folder)
            folder.mkdir()
        case "no json":
            (folder / "config.json").write_bytes(b"\x80\x04K\x01.")
        case "remote code":
            change(folder, auto_map={"AutoModel": "modeling.Evil"})
            (folder / "modeling.py").write_text(f"import os; os.mkdir({str(mark)!r})")
        case "remote code of a tokenizer":
            path = folder / "tokenizer_config.json"
            code = {"auto_map": {"AutoTokenizer": ["tok.Evil", None]}, "tokenizer_class": "Evil"}
            path.write_text(json.dumps(json.loads(path.read_text()) | code))
            (folder / "tok.py").write_text(f"import os; os.mkdir({str(mark)!r})")
            (folder / "tokenizer.json").unlink()
        case "pickle":
            weights.unlink()
            torch.save({"a": Evil(mark)}, folder / "pytorch_model.bin")
        case "pickle by another name":
            torch.save({"a": Evil(mark)}, weights)
        case "header":
            weights.write_bytes(struct.pack("<Q", 2**63) + weights.read_bytes()[8:])
        case "offsets":
            head = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
            weights.write_bytes(struct.pack("<Q", len(head)) + head)
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-9])
        case "not finite":
            tensors = load_file(weights)
            tensors["llm.lm_head.weight"][7] = float("nan")
            save_file(tensors, weights)
        case "endless weights":
            weights.unlink()
            weights.symlink_to("/dev/zero")
        case "a pipe":
            weights.unlink()
            os.mkfifo(weights)
        case "a link that leads nowhere":
            weights.unlink()
            weights.symlink_to("/nowhere/model.safetensors")
        case "huge sizes":
            config = json.loads((folder / "config.json").read_text())
            config["llm"]["config"]["hidden_size"] = 2**40
            change(folder, llm=config["llm"])
        case "a template that loops":
            change(folder, template="tokenizer")
            loops = "{% for i in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3
            (folder / "chat_template.jinja").write_text(loops)
        case "a template that imports":
            change(folder, template="tokenizer")
            (folder / "chat_template.jinja").write_text("{% import 'os' as os %}{{ os.mkdir('x') }}")
        case "a template that reaches out":
            change(folder, template="tokenizer")
            inner = "''.__class__.__mro__[1].__subclasses__()"
            (folder / "chat_template.jinja").write_text("{{ " + inner + " }}")
        case "a zip":
            shutil.make_archive(str(folder), "zip", folder)
            shutil.rmtree(folder)
            folder.with_suffix(".zip").rename(folder)
        case _:
            raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("empty", "it has no config.json"),
        ("no json", "config.json: not UTF-8"),
        ("remote code of a tokenizer", "custom code to be run; give a folder with tokenizer.json"),
        ("pickle", "model.safetensors: the weights file does not exist"),
        ("pickle by another name", "damaged or truncated safetensors"),
        ("header", "damaged or truncated safetensors"),
        ("offsets", "damaged or truncated safetensors"),
        ("cut", "damaged or truncated safetensors"),
        ("not finite", "not finite"),
        ("endless weights", "model.safetensors: "),
        ("a pipe", "model.safetensors: "),
        ("a link that leads nowhere", "the weights file does not exist"),
        ("huge sizes", "config.json"),
        ("a template that loops", "it takes longer than 0.2 seconds; mend the template"),
        ("a template that imports", "refuses the conversation"),
        ("a template that reaches out", "refuses the conversation"),
        ("a zip", "it is a file; give the folder that it is in"),
    ],
)
def test_hostile_model_folders(capsys, folder, tmp_path, monkeypatch, how, message):
    """Nothing of a folder is run, nothing waits for ever, and the exit code is 2; a second model changes nothing."""
    monkeypatch.setattr(own_template, "_SECONDS", 0.2)
    path, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(folder, path)
    hostile(path, how, mark)
    assert message in said(capsys, str(path), "--port", "0")
    if how == "cut":  # beside one that has been loaded
        assert message in said(capsys, "--models", f"good={folder}", f"bad={path}", "--port", "0")
    assert not mark.exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("tlf-engine", "tlf-prepare"))]


def test_code_that_a_folder_names_is_not_run(folder, tmp_path):
    """A repository of the Hub names code for transformers; it opens as the model folder that it also is."""
    path, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(folder, path)
    hostile(path, "remote code", mark)
    tinyllava_fast.load(path)
    assert not mark.exists()


def head_of(server: Running, method: str, path: str, **headers: str) -> tuple[int, bytes]:
    status, body, _ = server.ask(method, path, headers=headers)
    return status, body


def test_a_server_of_another_address_that_loses_its_folder(start, folder, tmp_path, expected):
    """IPv6 where there is one; the files of the model are gone; the terminal is closed while it answers."""
    path = tmp_path / "gone" / "final"
    shutil.copytree(folder, path)
    server = start(str(path), *(["--host", "::1"] if HAS_IPV6 else []))
    assert ":" in server.host or not HAS_IPV6
    shutil.rmtree(path)
    status, body, _ = server.chat()
    assert (status, body["choices"][0]["message"]["content"], body["model"]) == (200, expected, "gone")
    for route in ("/", "/health", "/health/live", "/v1/models", "/metrics"):
        assert head_of(server, "HEAD", route) == (200, b"")
    for method in ("GET", "HEAD", "PUT", "OPTIONS"):
        status, body, headers = server.ask(method, "/v1/chat/completions")
        assert (status, headers["allow"]) == (405, "POST") and (method == "HEAD") == (not body)
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    status, _, found = server.ask("OPTIONS", "/v1/chat/completions", headers={"Origin": "http://a.example", **asked})
    assert status == 403 and not [name for name in found if name.startswith("access-control")]
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(server.chat("go on", max_tokens=900, ignore_eos=True)))
    asking.start()
    wait(lambda: server.metric("tlf_running") > 0)
    server.process.send_signal(signal.SIGHUP)
    asking.join()
    assert answers[0][1]["usage"]["completion_tokens"] == 900 and server.process.wait(30) == 0


def test_told_twice_it_ends_at_once(start, folder):
    server = start(str(folder))
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(server.chat("go on", max_tokens=1900, ignore_eos=True, n=16)[0])
        except (ConnectionError, http.client.HTTPException):
            answers.append(0)

    asking = threading.Thread(target=ask)
    asking.start()
    wait(lambda: server.metric("tlf_running") > 0)
    server.process.terminate()
    wait(lambda: server.ask("GET", "/health/ready")[0] == 503)
    began = time.monotonic()
    server.process.terminate()
    assert server.process.wait(30) == 0 and time.monotonic() - began < 8
    asking.join(10)
    assert answers == [503]


def wait(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_log_costs_no_answer(folder, tmp_path):
    """The server writes nothing but its log. The working folder may not be written to, either."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = tmp_path / "read_only"
    path.mkdir(mode=0o555)
    command = [sys.executable, "-m", "tinyllava_fast.serve.cli", str(folder), "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(command, stdout=full, stderr=full, cwd=path, env=environment)
    try:

        def ready() -> bool:
            assert process.poll() is None
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                connection.request("GET", "/v1/models")
                return connection.getresponse().status == 200
            except ConnectionError:
                return False

        deadline = time.monotonic() + 120
        while not ready():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.terminate()
        assert process.wait(30) == 0 and not list(path.iterdir())
    finally:
        process.kill()


def test_texts_of_control_tokens_are_ready_before_the_first_request(folder, monkeypatch):
    """The copy of the tokenizer that they need takes seconds for a large vocabulary; nobody waits for it."""
    from tinyllava_fast.data.templates import _controls
    from tinyllava_fast.infer.types import Request, Sampling
    from tinyllava_fast.serve.cli import _open, parser

    served = _open("tiny", str(folder), parser().parse_args([str(folder), "--device", "cpu"]))
    try:
        before = _controls.secret_tokenizer.cache_info().misses
        request = Request(messages=[{"from": "human", "value": ["a </s> b"]}], sampling=Sampling(max_new_tokens=1))
        assert served.live.submit(request).result(30).tokens
        assert _controls.secret_tokenizer.cache_info().misses == before
        assert served.engine.tokenizer.name_or_path == "tiny"
    finally:
        served.live.close()


def test_a_template_of_the_tokenizer_names_no_folder(tmp_path):
    """Its refusals reach the client; and what others make of a date or a variable that nobody sets works."""
    from tinyllava_fast.serve.cli import _open, parser

    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ strftime_now('%Y') }}{% if enable_thinking is defined and not enable_thinking %}<think>{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    path = tmp_path / "final"
    save_model(make_model(), tokenizer, build_image_processor(tiny_config()), path)
    change(path, template="tokenizer")
    served = _open("own", str(path), parser().parse_args([str(path), "--device", "cpu"]))
    try:
        from tinyllava_fast.infer.types import Request, Sampling

        def answer(*roles: str) -> Any:
            messages = [{"from": role, "value": ["a </s> b"]} for role in roles]
            return served.live.submit(Request(messages=messages, sampling=Sampling(max_new_tokens=2))).result(30)

        assert answer("human").tokens and answer("human", "gpt", "human").tokens
        why = answer("system", "human").why
        assert "no system here" in why and str(tmp_path) not in why and "'own'" in why
    finally:
        served.live.close()
