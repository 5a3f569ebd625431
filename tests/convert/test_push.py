"""--push creates a repository on the Hub, uploads large files, commits. Here: a stand-in of the Hub's API."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.tiny import make_model, make_tokenizer, tiny_config
from tinyllava_fast.convert.cli import main
from tinyllava_fast.convert.push import push
from tinyllava_fast.errors import UserError
from tinyllava_fast.models import io
from tinyllava_fast.models.build import build_image_processor


class Hub:
    """What a client did, and the files that it committed."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.created: dict[str, Any] = {}
        self.stored: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.refuses = False
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        self.calls.append(f"{method} {path.split('?')[0]}")
        if self.refuses:
            return 401, {"error": "Invalid credentials"}
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return 200, {"url": f"{self.url}/me/shapes", "name": "me/shapes", "id": "me/shapes"}
        if "/preupload/" in path:
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            return 200, {"files": modes}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if path.startswith("/lfs/"):
            self.stored[path.removeprefix("/lfs/")] = body
            return 200, {}
        if "/commit/" in path:
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    self.files[value["path"]] = self.stored[value["oid"]]
            return 200, {"commitUrl": f"{self.url}/me/shapes/commit/abc", "commitOid": "a" * 40, "hookOutput": ""}
        return 200, {"id": "me/shapes", "sha": "a" * 40, "siblings": []}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants as constants

    made = Hub()

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, value = made.answer(self.command, self.path, body)
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = respond

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()


def test_export_and_push(hub: Hub, tmp_path: Path) -> None:
    io.save_model(make_model(), make_tokenizer(), build_image_processor(tiny_config()), tmp_path / "ours")
    out = tmp_path / "hub"
    command = ["export", str(tmp_path / "ours"), str(out), "--format", "hub", "--push", "me/shapes", "--private"]
    assert main(command) == 0
    assert hub.created["name"] == "shapes" and hub.created["organization"] == "me"
    assert hub.created.get("private") is True or hub.created.get("visibility") == "private"
    assert hub.files == {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    weights = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    assert list(hub.stored) == [weights]


def test_a_refusal_names_what_to_do(hub: Hub, tmp_path: Path) -> None:
    hub.refuses = True
    with pytest.raises(UserError, match=r"--push me/shapes: .*401.*hf auth login"):
        push(tmp_path, "me/shapes")
    for name in ("shapes", "me/", "a/b/c", "https://hf.co/me/shapes", "me/a..b", "me/a--b", "me/.git", "me/naïve"):
        assert main(["export", str(tmp_path), str(tmp_path / "x"), "--format", "hub", "--push", name]) == 2
    assert main(["export", str(tmp_path), str(tmp_path / "x"), "--format", "gguf", "--push", "me/shapes"]) == 2


def test_a_hub_that_cannot_be_reached(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as constants

    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    with pytest.raises(UserError, match=r"--push me/shapes: .*see that the Hub can be reached"):
        push(tmp_path, "me/shapes")
    assert hub.calls == []
