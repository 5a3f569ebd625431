"""A real server as a process on a tiny model, what to drive it with, and an engine that tells the right answers."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from tests.serve import chromium
from tests.serve.asking import SCRIPT
from tests.tiny import make_engine, make_model, make_tokenizer, tiny_config
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.models.build import build_image_processor
from tinyllava_fast.models.io import save_model

ROOT = Path(__file__).parents[2]
KEY = "sk-a-key-of-this-test"
SECRETS = (KEY, "Traceback", "tinyllava_fast/", ".py", "/tmp", "site-packages", "127.0.0.1")
JSON = {"Content-Type": "application/json"}


class Running:
    """A server that runs. log: what it has written so far."""

    def __init__(self, arguments: list[str], log: Path, key: str | None = None) -> None:
        self.path = log
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if key is not None:
            environment["TLF_API_KEY"] = key
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        command = [sys.executable, "-m", "tinyllava_fast.serve.cli", "--port", "0", "--device", "cpu", *arguments]
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT)
        self.host, self.port = self._wait()

    def _wait(self) -> tuple[str, int]:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r" at http://(\S+):(\d+)", self.log):
                return found[1].strip("[]"), int(found[2])
            time.sleep(0.05)
        raise RuntimeError(f"the server did not start: {self.log}")

    @property
    def log(self) -> str:
        return self.path.read_text(errors="replace")

    def ask(self, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, Any, dict[str, str]]:
        """Status, body (decoded if it is JSON) and headers of one request; body: bytes as they are, else as JSON."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        given = {**self.headers, **(JSON if body is not None else {}), **(headers or {})}
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, content, given)
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, json.loads(text) if text and "json" in found.get("content-type", "") else text, found

    def chat(self, content: Any = "why?", **more: Any) -> tuple[int, Any, dict[str, str]]:
        """``ask`` a greedy chat of one message."""
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0, **more}
        return self.ask("POST", "/v1/chat/completions", body)

    def metric(self, name: str) -> float:
        """The sum of a metric's values."""
        text = self.ask("GET", "/metrics")[1].decode()
        return sum(map(float, re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.M)))

    def stop(self) -> int:
        """Its exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "final"
    save_model(make_model(), make_tokenizer(), build_image_processor(tiny_config()), path)
    return path


@pytest.fixture(scope="session")
def engine() -> Engine:
    return make_engine(make_model(), make_tokenizer())


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """Start a server with these arguments; it is ended with the module."""
    started: list[Running] = []

    def starting(*arguments: str, key: str | None = None) -> Running:
        started.append(Running(list(arguments), tmp_path_factory.mktemp("log") / "server.log", key))
        return started[-1]

    yield starting
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8)) for i in range(3)]


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def data_uri(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@pytest.fixture(scope="session")
def listener() -> Iterator[socket.socket]:
    """What a request to this machine would reach: nobody may connect to it."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.settimeout(0.01)
        yield made


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A media folder with a picture, and ways out of it."""
    root = tmp_path_factory.mktemp("media")
    (root / "outside").mkdir()
    (root / "in" / "deep").mkdir(parents=True)
    picture = saved(Image.new("RGB", (8, 8), "red"))
    for name in ("in/a.png", "in/deep/b.png", "outside/secret.png", "inside.png"):
        (root / name).write_bytes(picture)
    (root / "in/text.png").write_text("a secret line")
    (root / "in/link.png").symlink_to("deep/b.png")
    (root / "in/out.png").symlink_to("../outside/secret.png")
    (root / "in/folder").symlink_to("../outside")
    (root / "in/zero.png").symlink_to("/dev/zero")
    os.mkfifo(root / "in/pipe.png")
    return root / "in"


@pytest.fixture(scope="session")
def attacked(
    folder: Path, media: Path, listener: socket.socket, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server with a key and small limits."""
    port = listener.getsockname()[1]
    limits = ["--max-body-mb", "2", "--max-image-mb", "1", "--max-images", "4", "--max-megapixels", "4"]
    hosts = ["--allow-host", f"localhost:{port}", "--allow-host", "127.0.0.1", "--allow-host", "[::1]"]
    more = ["--client-seconds", "2", "--max-connections", "40", "--media-path", str(media)]
    server = Running([str(folder), *limits, *hosts, *more], tmp_path_factory.mktemp("attacked") / "log", KEY)
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="session")
def expected(engine: Engine) -> str:
    return engine.answers([Request.ask("why?", sampling=Sampling(max_new_tokens=4))])[0].text


@pytest.fixture
def safe(attacked: Running, expected: str) -> Iterator[Running]:
    """The server, which still answers right after the test, and has told nothing."""
    yield attacked
    status, body, _ = attacked.chat()
    assert status == 200 and body["choices"][0]["message"]["content"] == expected
    assert KEY not in attacked.log and "Traceback" not in attacked.log


def refused(answer: tuple[int, Any, dict[str, str]], *allowed: int) -> dict[str, Any]:
    """The error of an answer with one of these statuses (400), in OpenAI's form, that tells nothing."""
    status, body, headers = answer
    assert status in (allowed or (400,)), body
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert not any(secret in json.dumps([body, headers]) for secret in SECRETS), body
    return body["error"]


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that does not come to an end."""
    model = make_model(seed=1)
    with torch.no_grad():
        model.llm.lm_head.weight[2] = 0
    path = tmp_path_factory.mktemp("endless") / "final"
    save_model(model, make_tokenizer(), build_image_processor(tiny_config()), path)
    return path


@pytest.fixture(scope="session")
def page_server(folder: Path, endless: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of two models, for the page."""
    models = ["--look", "--models", f"endless={endless}", f"tiny={folder}"]
    server = Running(models, tmp_path_factory.mktemp("page") / "log")
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if chromium.PATH is None:
        pytest.skip("there is no chromium to drive")
    found = chromium.Chromium(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def page(browser: Any, page_server: Running) -> Iterator[Any]:
    """The page, freshly opened. Whatever a test does, no request leaves the server and no script fails."""
    origin = f"http://127.0.0.1:{page_server.port}/"
    browser.size(1100, 800)
    browser.scheme("light")
    browser.open(origin)
    browser.run("localStorage.clear(); sessionStorage.clear()")
    browser.events.clear()
    browser.open(origin)
    browser.wait("document.querySelector('#model').options.length === 2")
    yield browser
    browser.real()
    for told in browser.told("Network.requestWillBeSent"):
        assert told["request"]["url"].startswith((origin, "data:image/"))
    assert not browser.told("Runtime.exceptionThrown")
    assert [one for one in browser.told("Log.entryAdded") if one["entry"]["source"] in ("security", "javascript")] == []


@pytest.fixture
def files(tmp_path: Path, pictures) -> list[Path]:
    """Two pictures with script in their metadata, one also in its name."""
    paths = [tmp_path / "first.png", tmp_path / f"{SCRIPT.replace('/', '')}.png"]
    script = PngImagePlugin.PngInfo()
    for name in ("Comment", "XML:com.adobe.xmp"):
        script.add_itxt(name, SCRIPT)
    for path, picture in zip(paths, pictures, strict=False):
        path.write_bytes(saved(picture, pnginfo=script))
    return paths
