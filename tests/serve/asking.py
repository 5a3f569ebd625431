"""What a person does on the page, for a browser to do."""

from __future__ import annotations

import json
from typing import Any

CHAT = "/v1/chat/completions"
IDLE = "document.querySelector('#stop').hidden && document.querySelectorAll('.answer[aria-busy=false]').length > 0"
SCRIPT = "<img src=x onerror=window.bad=1><script>window.bad=1</script>"


def ask(page: Any, text: str) -> None:
    """Ask, and wait for the end of the answer."""
    begin(page, text)
    page.wait(IDLE)


def begin(page: Any, text: str) -> None:
    page.click("#question")
    page.run("document.querySelector('#question').select()")
    page.type(text)
    page.press("Enter")


def reload(page: Any, models: int = 2) -> None:
    page.run("window.old = true; location.reload()")
    page.wait(f"!window.old && document.querySelector('#model')?.options.length === {models}")


def bodies(page: Any) -> list[dict[str, Any]]:
    """What has been asked of the server."""
    sent = [one["request"] for one in page.told("Network.requestWillBeSent") if one["request"]["url"].endswith(CHAT)]
    return [json.loads(request["postData"]) for request in sent]


def choose(page: Any, select: str, name: str) -> None:
    page.run(f"document.querySelector('{select}').value = {json.dumps(name)}")


def set_field(page: Any, name: str, value: str) -> None:
    found = f"document.querySelector('#settings-form [name={name}]')"
    page.run(f"{found}.value = {json.dumps(value)}; {found}.dispatchEvent(new Event('input', {{bubbles: true}}))")
