"""A judge on this machine: an HTTP server that speaks chat completions, and misbehaves as told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = dict[str, Any]
"""say: the completion's text. status: an HTTP error. raw: bytes instead of a completion. stall: seconds before it.
cut: close the connection in the middle of the reply. headers: more of them."""


class Judge(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, behave: Callable[[int, dict[str, Any]], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = behave
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.seen)
            self.server.seen.append(body)
            self.server.keys.append(self.headers.get("Authorization"))
        reply = self.server.behave(number, body) if self.path == "/v1/chat/completions" else {"status": 404}
        time.sleep(reply.get("stall", 0))
        message = {"role": "assistant", "content": reply.get("say")}
        data = reply.get("raw") or json.dumps({"model": "judge-1", "choices": [{"message": message}]}).encode()
        try:
            self.send_response(reply.get("status", 200))
            for name, value in reply.get("headers", {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if reply.get("cut") else data)
        except OSError:
            pass  # the client gave up

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def judge(behave: Callable[[int, dict[str, Any]], Reply]) -> Iterator[Judge]:
    """behave(number of the request, its body) -> what to reply."""
    server = Judge(behave)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
