"""Debian's Chromium without a window, driven through the Chrome DevTools Protocol."""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

PATH = shutil.which("chromium")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --no-default-browser-check "
    "--disable-background-networking --disable-component-update --disable-extensions --disable-sync "
    "--remote-debugging-port=0 --force-color-profile=srgb --hide-scrollbars=false"
).split()
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35}


class Chromium:
    """A browser with one tab. events: what it has told so far, as {method, params}."""

    def __init__(self, folder: Path) -> None:
        assert PATH is not None
        port_file = folder / "DevToolsActivePort"
        command = [PATH, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (port_file.is_file() and port_file.read_text().count("\n")):
            assert time.monotonic() < deadline and self.process.poll() is None, "chromium did not start"
            time.sleep(0.05)
        self.port = int(port_file.read_text().split()[0])
        self._open = contextlib.ExitStack()
        self.socket = self._open.enter_context(connect(self._tab(), max_size=2**26, compression=None))
        self.events: list[dict[str, Any]] = []
        self.fakes: dict[str, tuple[int, str, str]] = {}
        self._ids = itertools.count(1)
        for domain in ("Page", "Network", "Runtime", "Log", "DOM", "Accessibility"):
            self.call(f"{domain}.enable")

    def _tab(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", "/json/list")
        tabs = json.loads(connection.getresponse().read())
        return next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")

    def close(self) -> None:
        self._open.close()
        self.process.terminate()
        self.process.wait(30)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command of the protocol."""
        number = next(self._ids)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            found = json.loads(self.socket.recv(timeout=60))
            if found.get("method") == "Fetch.requestPaused":
                self._answer(found["params"])
            elif "method" in found:
                self.events.append(found)
            elif found["id"] != number:
                continue  # of an answer for the network
            elif "error" in found:
                raise RuntimeError(f"{method}: {found['error']}")
            else:
                return dict(found["result"])

    def fake(self, path: str, body: str, *, status: int = 200, kind: str = "application/json") -> None:
        """Answer a path in place of the server, until ``real``."""
        self.fakes[path] = (status, kind, body)
        self.call("Fetch.enable", patterns=[{"urlPattern": f"*{one}"} for one in self.fakes])

    def real(self) -> None:
        self.fakes.clear()
        self.call("Fetch.disable")

    def _answer(self, paused: dict[str, Any]) -> None:
        status, kind, body = next(fake for path, fake in self.fakes.items() if paused["request"]["url"].endswith(path))
        answer = {
            "requestId": paused["requestId"],
            "responseCode": status,
            "responseHeaders": [{"name": "Content-Type", "value": kind}],
            "body": base64.b64encode(body.encode()).decode(),
        }
        self.socket.send(json.dumps({"id": next(self._ids), "method": "Fetch.fulfillRequest", "params": answer}))

    def told(self, method: str) -> list[dict[str, Any]]:
        """The events of one kind so far."""
        self.call("Runtime.evaluate", expression="0")
        return [event["params"] for event in self.events if event["method"] == method]

    def run(self, expression: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> Any:
        """The value of an expression once it is true."""
        deadline = time.monotonic() + seconds
        while not (found := self.run(expression)):
            assert time.monotonic() < deadline, f"never true: {expression}; the page shows: {self.text('body')}"
            time.sleep(0.03)
        return found

    def text(self, selector: str) -> str:
        """The visible text of an element."""
        found = f"document.querySelector({json.dumps(selector)})"
        return str(self.run(f"{found}?.checkVisibility() ? {found}.innerText : ''"))

    def count(self, selector: str) -> int:
        return int(self.run(f"document.querySelectorAll({json.dumps(selector)}).length"))

    def click(self, selector: str) -> None:
        self._mouse(selector, ("mouseMoved", "mousePressed", "mouseReleased"))

    def hover(self, selector: str) -> None:
        self._mouse(selector, ("mouseMoved",))

    def _mouse(self, selector: str, kinds: Sequence[str]) -> None:
        found = json.dumps(selector)
        self.wait(f"document.querySelector({found}) !== null")
        box = self.run(
            f"(() => {{ const e = document.querySelector({found}); e.scrollIntoView({{block: 'nearest'}});"
            "const r = e.getClientRects()[0]; return r ? [r.x + r.width / 2, r.y + r.height / 2] : null })()"
        )
        assert box, f"{selector} is not shown"
        for kind in kinds:
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], **button)

    def type(self, text: str) -> None:
        """Put text where the focus is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown", **code, **({"text": "\r"} if key == "Enter" else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def upload(self, selector: str, files: Sequence[Path]) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def scheme(self, name: str) -> None:
        """Prefer dark or light."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def picture(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def focus_order(self) -> list[str]:
        """What the tab key goes through, from the page's first link. On each thing the focus is seen."""
        found: list[str] = []
        self.run("document.querySelector('a').focus()")
        while not self.run("document.activeElement === document.body") and len(found) < 40:
            found.append(self.run("document.activeElement.id || document.activeElement.textContent"))
            assert self.run("getComputedStyle(document.activeElement).outlineStyle") != "none", found[-1]
            self.press("Tab")
        return found


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
