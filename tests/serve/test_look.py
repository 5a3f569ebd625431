"""Looks inside answers over HTTP and on the page."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serve.asking import ask, choose
from tests.serve.conftest import Running, data_uri, image_part, refused, text_part
from tinyllava_fast.look.types import METHODS
from tinyllava_fast.serve.answering import OneByOne
from tinyllava_fast.serve.problems import ApiError

LOOK = "/v1/look"


def body(files: list[Path], **more: object) -> dict[str, object]:
    content = [image_part(data_uri(files[0].read_bytes())), text_part("what is it?")]
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 3, **more}


def test_a_look_is_at_the_greedy_answer(page_server: Running, files: list[Path]) -> None:
    status, found, _ = page_server.ask("POST", LOOK, body(files))
    assert status == 200, found
    asked = page_server.chat(body(files)["messages"][0]["content"], model="tiny", max_tokens=3)[1]
    assert found["question"] == "what is it?"
    assert found["answer"] == asked["choices"][0]["message"]["content"]
    assert {m["name"] for m in found["methods"]} == set(METHODS) and len(found["pictures"]) == 1
    assert 0 < len(found["tokens"]) <= 3 and found["curves"]["random"]["deletion"]


def test_what_is_refused(page_server: Running, attacked: Running, files: list[Path]) -> None:
    text = {"model": "tiny", "messages": [{"role": "user", "content": "why?"}]}
    assert refused(page_server.ask("POST", LOOK, text))["message"] == "there is no picture to look at"
    assert refused(page_server.ask("POST", LOOK, body(files, max_tokens=10**6)))["param"] == "max_tokens"
    assert refused(page_server.ask("POST", LOOK, body(files, temperature=1)))["param"] == "temperature"
    assert page_server.ask("GET", LOOK)[0] == 405
    assert attacked.ask("POST", LOOK, body(files), {"Authorization": "Bearer wrong"})[0] == 401
    off = refused(attacked.ask("POST", LOOK, body(files, model=None)), 404)
    assert "started with --look" in off["message"]


def test_who_hangs_up_ends_the_work_before_the_next_begins() -> None:
    async def hang_up_and_ask_again() -> list[str]:
        one_by_one, done, begun = OneByOne(), [], threading.Event()

        def endless(check: Callable[[], None]) -> None:
            begun.set()
            try:
                while True:
                    check()
                    time.sleep(0.001)
            finally:
                done.append("first")

        first = asyncio.ensure_future(one_by_one.run(endless))
        await asyncio.to_thread(begun.wait, 60)
        waiting = [asyncio.ensure_future(one_by_one.run(lambda check: done.append("next"))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="too many looks"):
            one_by_one.check_room()
        first.cancel()
        await asyncio.wait_for(asyncio.gather(first, *waiting, return_exceptions=True), 60)
        one_by_one.check_room()
        return done

    assert asyncio.run(hang_up_and_ask_again()) == ["first", "next", "next", "next"]


def test_the_tab_shows_the_last_answer(page, files: list[Path]) -> None:
    page.upload("#files", files[:1])
    page.wait("document.querySelectorAll('#pictures img').length === 1")
    choose(page, "#model", "tiny")
    ask(page, "what is it?")
    page.click("#look-tab")
    page.wait("document.querySelectorAll('#look-view canvas').length === 1")
    chips = page.run("document.querySelectorAll('#look-view .look-chip').length")
    page.click("#look-view .look-chip:nth-child(2)")
    page.click("#look-view canvas")
    assert chips > 1 and page.run("document.querySelector('#look-view .look-rows').textContent").startswith("Image row")
    for method in METHODS:
        page.run(
            "{const box = document.querySelector('#look-view select');"
            f"box.value = '{method}'; box.dispatchEvent(new Event('change'))}}"
        )
    assert page.count("#look-view figure") == 2
    page.click("#look-tab")
    assert page.run("document.querySelector('#look').hidden") is True
