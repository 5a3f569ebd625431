"""A server on this machine that speaks chat completions, and misbehaves as told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = dict[str, Any]
"""say: the completion's text. finish: why it ended. status: an HTTP error. raw: bytes instead of a completion. stall:
seconds before it. cut: close the connection in the middle of the reply. drop: close it before. headers: more of them.
events: a stream of these data instead of a completion. pause: seconds after each of them."""


class ChatServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, behave: Callable[[int, dict[str, Any]], Reply], models: Sequence[str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = behave
        self.models = models
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.left = 0  # streams whose reader went away
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        data = json.dumps({"data": [{"id": name} for name in self.server.models]}).encode()
        self._send(data if self.path.endswith("/v1/models") else b"", {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.seen)
            self.server.seen.append(body)
            self.server.keys.append(self.headers.get("Authorization"))
            self.server.paths.append(self.path)
        known = self.path.endswith("/v1/chat/completions")
        self._reply(self.server.behave(number, body) if known else {"status": 404})

    def _reply(self, reply: Reply) -> None:
        time.sleep(reply.get("stall", 0))
        if reply.get("drop"):
            self.close_connection = True
            return
        if "events" in reply:
            self._stream([f"data: {event}\n\n".encode() for event in reply["events"]], reply)
            return
        choice = {
            "message": {"role": "assistant", "content": reply.get("say")},
            "finish_reason": reply.get("finish", "stop"),
        }
        whole = json.dumps({"model": "judge-1", "choices": [choice]}).encode()
        self._send(reply.get("raw", b"" if "status" in reply else whole), reply)

    def _stream(self, events: list[bytes], reply: Reply) -> None:
        kind = {"Content-Type": "text/event-stream"}
        if "pause" not in reply:
            self._send(b"".join(events), {**reply, "headers": kind})
            return
        try:
            self.send_response(200)
            self.send_header("Content-Type", kind["Content-Type"])
            self.end_headers()
            for event in events:
                self.wfile.write(event)
                time.sleep(reply["pause"])
        except OSError:
            self.server.left += 1

    def _send(self, data: bytes, reply: Reply) -> None:
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
def chat_server(
    behave: Callable[[int, dict[str, Any]], Reply], models: Sequence[str] = ("tiny",)
) -> Iterator[ChatServer]:
    """behave(number of the request, its body) -> what to reply."""
    server = ChatServer(behave, models)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
