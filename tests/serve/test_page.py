"""The page in a real browser on a real server: what people do with it, and what it must never do."""

from __future__ import annotations

import json
import re
import time

import pytest

from tests.serve import chromium
from tests.serve.asking import CHAT, IDLE, SCRIPT, ask, begin, bodies, choose, reload, set_field
from tests.serve.conftest import data_uri, image_part, text_part
from tinyllava_fast.serve.app import PAGE


def test_files_are_short_and_make_no_markup_of_text() -> None:
    files = [path for path in PAGE.iterdir() if path.suffix in (".html", ".css", ".js")]
    assert len(files) > 5
    unsafe = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|https?://|style=|\son\w+=")
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 400 and not unsafe.search(text), path.name


def test_a_picture_is_asked_about_and_the_answer_streams(page, page_server, files):
    page.upload("#files", files[:1])
    page.wait("document.querySelectorAll('#pictures img').length === 1")
    page.run(
        "window.lengths = new Set(); new MutationObserver(() => lengths.add("
        "document.querySelector('.answer .text')?.textContent.length)).observe("
        "document.querySelector('#turns'), {subtree: true, childList: true, characterData: true})"
    )
    ask(page, "what is it?")
    (body,) = bodies(page)
    content = [image_part(data_uri(files[0].read_bytes())), text_part("what is it?")]
    assert body["messages"] == [{"role": "user", "content": content}]
    expected = page_server.chat(content, model="endless", max_tokens=256)[1]["choices"][0]["message"]["content"]
    assert page.run("document.querySelector('.answer .text').textContent") == expected
    assert page.run("lengths.size") > 3
    facts = page.text(".facts")
    assert "to first token" in facts and "tokens/s" in facts and "256 tokens" in facts and "cut" in facts
    assert page.run("document.querySelector('.question img').alt") == "first.png" and page.count("#pictures img") == 0
    assert page.run("document.querySelector('#spoken').textContent").split() == expected.split()


def test_turns_build_on_each_other_and_can_be_asked_anew(page):
    choose(page, "#model", "tiny")
    ask(page, "one")
    ask(page, "two")
    first = page.run("document.querySelector('.answer .text')?.textContent ?? ''")
    wanted = [{"role": "user", "content": "one"}, {"role": "assistant", "content": first}]
    assert bodies(page)[1]["messages"] == [*wanted, {"role": "user", "content": "two"}]
    page.click(".turn > button")
    page.wait(IDLE)
    assert bodies(page)[2] == bodies(page)[1] and page.count(".turn") == 2
    page.click(".turn:first-child .question button")
    assert page.run("document.querySelector('#question').value") == "one" and "Editing question 1" in page.text(
        "#editing"
    )
    ask(page, "three")
    assert bodies(page)[3]["messages"] == [{"role": "user", "content": "three"}]
    assert page.count(".turn") == 1 and page.text(".question .text") == "three" and not page.text("#editing")
    page.click("#fresh")
    assert page.count(".turn") == 0 and "Ask about a picture" in page.text("#empty")


@pytest.mark.parametrize("how", ["button", "key"])
def test_an_answer_is_stopped(page, page_server, how):
    set_field(page, "max_tokens", "1900")
    begin(page, "go on")
    page.wait("document.querySelector('.answer .text')?.textContent.length > 5")
    page.press("Escape") if how == "key" else page.click("#stop")
    page.wait(IDLE)
    assert "stopped" in page.text(".facts") and page.run("document.activeElement.id") == "question"
    deadline = time.monotonic() + 10
    while page_server.metric("tlf_running"):
        assert time.monotonic() < deadline
    choose(page, "#model", "tiny")
    ask(page, "again")
    assert page.count(".turn") == 2 and "stopped" not in page.text(".turn:last-child .facts")


def test_settings_are_sent_kept_and_checked(page):
    page.click("#settings-button")
    assert page.run("document.activeElement.name") == "system"
    page.type("be brief")
    values = {"temperature": "0.5", "top_p": "0.9", "seed": "7", "max_tokens": "3", "top_k": "5", "stop": "a\nb"}
    for name, value in values.items():
        set_field(page, name, value)
    page.press("Escape")
    assert page.run("document.querySelector('#settings').hidden")
    ask(page, "why?")
    (body,) = bodies(page)
    sent = {name: body[name] for name in values}
    assert sent == {"temperature": 0.5, "top_p": 0.9, "seed": 7, "max_tokens": 3, "top_k": 5, "stop": ["a", "b"]}
    assert body["messages"][0] == {"role": "system", "content": "be brief"} and body["top_logprobs"] == 5
    reload(page)
    assert page.run("document.querySelector('#settings-form [name=seed]').value") == "7"
    set_field(page, "top_p", "3")
    page.click("#question")
    page.type("why?")
    page.press("Enter")
    page.wait("!document.querySelector('#notice').hidden")
    assert "Top-p" in page.text("#notice") and page.count(".turn") == 0
    assert page.run("document.activeElement.name") == "top_p"
    page.click("#settings-reset")
    assert page.run("document.querySelector('#settings-form [name=top_p]').value") == ""


def test_two_models_side_by_side(page):
    set_field(page, "max_tokens", "8")
    page.click("#compare")
    ask(page, "who?")
    ask(page, "and now?")
    names = "[...document.querySelectorAll('.turn:last-child h3')].map((e) => e.textContent)"
    assert page.run(names) == ["endless", "tiny"]
    sent = bodies(page)
    assert [body["model"] for body in sent] == ["endless", "tiny"] * 2
    assert sent[0]["messages"] == sent[1]["messages"] and sent[2]["messages"][1] != sent[3]["messages"][1]
    page.click("#compare")
    ask(page, "alone")
    assert page.count(".turn:last-child .answer") == 1


def test_a_token_shows_its_probability_and_its_alternatives(page):
    set_field(page, "max_tokens", "6")
    ask(page, "why?")
    assert page.count(".token") > 1
    page.hover(".token:nth-of-type(2)")
    page.wait("!document.querySelector('#tip').hidden")
    assert page.count("#tip tr") == 5 and page.count("#tip .chosen") == 1 and "%" in page.text("#tip .chosen")
    page.hover("header h1")
    page.wait("document.querySelector('#tip').hidden")
    page.run("document.querySelector('.answer .text').focus({focusVisible: true})")
    page.press("Home")
    assert page.run("document.querySelector('.token.current') === document.querySelector('.token')")
    spoken = page.run("document.querySelector('#said').textContent")
    page.press("ArrowRight")
    assert page.run("[...document.querySelectorAll('.token')].indexOf(document.querySelector('.token.current'))") == 1
    assert "Also:" in spoken and page.run("document.querySelector('#said').textContent") != ""
    assert not page.run("document.querySelector('#tip').hidden")
    page.press("Escape")
    assert page.run("document.querySelector('#tip').hidden") and page.count(".token.current") == 0


def test_tokens_that_come_in_pieces_are_those_of_the_whole(page):
    """Whatever the pieces are: texts that come later than their tokens, parts of characters, tokens without text."""
    page.run("import('/tokens.js').then((m) => { window.m = m; return true })")
    script = """
        let state = SEED;
        const random = (n) => (state = (state * 48271) % 2147483647) % n;
        const known = [' a', 'bc', '.', ' \u05d0\u05d1', '\\n', 'x y', ' a', '\U0001f600'];
        let text = '', shown = 0; const tokens = [];
        for (let i = 0; i < 400; i++) {
          const kind = random(12);
          if (kind === 0) { text += '\u00e9'; tokens.push(['\ufffd', text.length - 1], ['\ufffd', text.length]); }
          else if (kind === 1) tokens.push(['</s>', text.length]);
          else { const one = known[random(known.length)]; text += one; tokens.push([one, text.length]); }
        }
        const all = tokens.map(([token]) => ({ token, logprob: -random(3) }));
        const grown = new m.TokenText(''), whole = new m.TokenText('');
        for (let i = 0; i < all.length; i += 1 + random(5)) {
          const arrived = tokens[Math.max(0, i - random(4))][1];
          shown = Math.max(shown, arrived);
          grown.update(text.slice(0, shown), all.slice(0, i + 1), false);
          if (grown.box.textContent !== text.slice(0, shown)) throw Error(i);
        }
        grown.update(text, all, true);
        whole.update(text, all, true);
        [grown.box.childNodes.length, grown.box.outerHTML === whole.box.outerHTML]
    """
    for seed in range(1, 6):
        count, equal = page.run("{" + script.replace("SEED", str(seed)) + "}")
        assert count > 300 and equal


def test_tokens_add_up_to_the_text_whatever_they_are(page):
    cases = [
        ("Hi there", [" Hi", " there", "</s>"]),
        ("é!", ["\ufffd", "\ufffd", "!"]),
        ("ab", ["a", "bcd"]),
        ("", ["</s>"]),
        ("lost", []),
    ]
    for text, tokens in cases:
        given = json.dumps([{"token": token, "logprob": -1} for token in tokens])
        pairs = page.run(
            f"import('/tokens.js').then((m) => m.align({json.dumps(text)}, {given})"
            ".map(([text, token]) => [text, token && token.token]))"
        )
        assert "".join(pair[0] for pair in pairs) == text
        assert [pair[1] for pair in pairs] == {"Hi there": tokens, "é!": ["\ufffd", "!"], "ab": tokens}.get(
            text, tokens or [None]
        )


def test_an_answer_is_copied(page):
    set_field(page, "max_tokens", "6")
    ask(page, "why?")
    text = page.run("document.querySelector('.answer .text').textContent")
    clipboard = "Object.defineProperty(navigator, 'clipboard', {configurable: true, value: VALUE})"
    page.run(clipboard.replace("VALUE", "{writeText: async (text) => { window.copied = text }}"))
    page.click(".answer button")
    page.wait("document.querySelector('.answer button').textContent === 'Copied'")
    assert page.run("copied") == text and page.text("#said") == "Copied"
    page.run(clipboard.replace("VALUE", "undefined"))  # as for a page over plain HTTP from another machine
    page.run("document.execCommand = () => { window.selected = document.activeElement.value; return true }")
    page.click(".answer button")
    page.wait("window.selected !== undefined")
    assert page.run("selected") == text and page.run("document.activeElement.textContent") == "Copied"


def test_pictures_are_dropped_pasted_and_removed(page, files):
    drag = {"items": [], "files": [str(files[0])], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        page.call("Input.dispatchDragEvent", type=kind, x=400, y=300, data=drag)
    page.wait("document.querySelectorAll('#pictures img').length === 1")
    pasting = "const d = new DataTransfer(); d.items.add(new File(['x'], '{}', {{type: '{}'}}));"
    event = "document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: d, cancelable: true}));"
    page.run("{" + pasting.format("b.png", "image/png") + event + "}")
    page.wait("document.querySelectorAll('#pictures img').length === 2")
    page.run("{" + pasting.format("c.txt", "text/plain") + event + "}")
    page.wait("document.querySelector('#notice').textContent === 'c.txt is no picture.'")
    page.click("#pictures li:first-child .remove")
    assert page.run("document.querySelector('#pictures img').alt") == "b.png"
    ask(page, "broken")
    assert "image" in page.text(".error") and page.count(".turn > button") == 1
    ask(page, "next")
    assert bodies(page)[1]["messages"] == [{"role": "user", "content": "next"}]  # not what failed


def test_no_text_becomes_markup(page, files):
    """Script in a model's name, a file's name, an answer, a token and an error stays text."""
    page.fake("/v1/models", json.dumps({"data": [{"id": SCRIPT}, {"id": "b"}]}))
    reload(page)
    one = {"token": SCRIPT, "logprob": -0.1}
    choice = {"delta": {"content": SCRIPT}, "logprobs": {"content": [{**one, "top_logprobs": [one]}]}}
    chunks = [{"choices": [choice]}, {"error": {"message": SCRIPT}}]
    page.fake(CHAT, "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks), kind="text/event-stream")
    page.upload("#files", files[1:])
    page.wait("document.querySelectorAll('#pictures img').length === 1")
    ask(page, SCRIPT)
    assert page.text(".answer h3") == SCRIPT and page.text(".error") == SCRIPT
    assert page.text(".answer .text") == SCRIPT and page.text(".question .text") == SCRIPT
    page.hover(".token")
    page.wait("!document.querySelector('#tip').hidden")
    page.fake(CHAT, json.dumps({"error": {"message": SCRIPT}}), status=400)
    ask(page, "more")
    assert page.text(".turn:last-child .error") == SCRIPT
    assert page.run("window.bad") is None and page.count("script") == 3
    refused = page.told("Log.entryAdded")
    assert page.run("try { document.body.innerHTML = '<b>'; 'set' } catch { 'refused' }") == "refused"
    page.events = [one for one in page.events if one["method"] != "Log.entryAdded" or one["params"] in refused]


def test_a_server_that_is_gone_or_speaks_otherwise_is_told(page):
    page.fake(CHAT, "<h1>proxy</h1>", status=502, kind="text/html")
    ask(page, "why?")
    assert "502" in page.text(".error")
    page.fake(CHAT, 'data: {"choices": [{"delta": {"content": "half"}}]}\n\n', kind="text/event-stream")
    page.click(".turn > button")
    page.wait("document.querySelector('.error')?.textContent.includes('ended')")
    assert page.text(".answer .text") == "half"


@pytest.mark.slow
def test_a_key_is_asked_for_and_kept_for_the_tab(page, start, folder):
    locked = start(str(folder), key="open-sesame")
    page.open(f"http://127.0.0.1:{locked.port}/")
    page.wait("document.querySelector('#key-dialog').open")
    shut = "!document.querySelector('#key-wrong').hidden"
    for key, then in (("wrong", shut), ("open-sesame", "!document.querySelector('#key-dialog').open")):
        page.run("document.querySelector('#key').select()")
        page.type(key)
        page.press("Enter")
        page.wait(then)
    ask(page, "why?")
    assert page.text(".facts") and not page.text(".error")
    assert "sesame" not in page.run("JSON.stringify(localStorage) + document.cookie + location.href")
    reload(page, 1)
    assert not page.run("document.querySelector('#key-dialog').open")
    page.run("sessionStorage.clear()")
    page.events.clear()


@pytest.mark.parametrize("width", [320, 360])
@pytest.mark.parametrize("settings", [False, True])
def test_a_phones_width_does_not_scroll_sideways(page, files, width, settings):
    page.size(width, 640, phone=True)
    page.click("#compare")
    set_field(page, "max_tokens", "30")
    page.upload("#files", files[:1] * 2)
    page.wait("document.querySelectorAll('#pictures img').length > 0")
    if settings:
        page.click("#settings-button")
    else:
        ask(page, "w" * 300)
    wide = "[...document.querySelectorAll('html, body, main, aside')].filter((e) => e.scrollWidth > e.clientWidth)"
    assert page.run(f"{wide}.map((e) => e.tagName)") == [] and page.run("innerWidth") == width


def test_dark_and_light(page):
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.run(paper)
    page.scheme("dark")
    dark = page.wait(f"{paper} !== {json.dumps(light)} && {paper}")
    page.wait("document.querySelector('#theme').textContent === 'Light'")
    page.click("#theme")
    assert page.run(paper) == light
    reload(page)
    assert page.run(paper) == light
    page.click("#theme")
    assert page.run(paper) == dark and page.run("localStorage.getItem('theme')") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_main_colours_can_be_read(page, scheme):
    page.scheme(scheme)
    names = ["paper", "sheet", "wash", "ink", "faint", "accent", "on-accent", "wrong"]
    found = page.run(
        f"{json.dumps(names)}.map((n) => getComputedStyle(document.documentElement).getPropertyValue('--' + n).trim())"
    )
    light = {name: chromium.luminance(value) for name, value in zip(names, found, strict=True)}
    pairs = [(front, back) for front in ("ink", "faint", "accent", "wrong") for back in ("paper", "sheet")]
    for front, back in [*pairs, ("ink", "wash"), ("accent", "wash"), ("on-accent", "accent")]:
        high, low = sorted((light[front], light[back]), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{front} on {back}"


def test_a_screen_reader_finds_names_for_everything(page, files):
    page.upload("#files", files[:1])
    page.wait("document.querySelectorAll('#pictures img').length === 1")
    set_field(page, "max_tokens", "6")
    ask(page, "why?")
    page.click("#settings-button")
    page.upload("#files", files[:1])
    page.wait("document.querySelectorAll('#pictures img').length === 1")
    nodes = [node for node in page.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    found: dict[str, list[str]] = {}
    for node in nodes:
        found.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", "").strip())
    controls = ("button", "textbox", "combobox", "spinbutton", "image", "link", "article", "group", "listitem")
    assert {role: names for role in controls if not all(names := found.get(role, [])) and role != "listitem"} == {}
    assert len(found["button"]) > 8 and len(found["spinbutton"]) > 6 and found["image"] == ["first.png"] * 2
    assert {"main", "banner", "contentinfo", "complementary", "log", "status"} <= set(found)
    reload(page)
    ask(page, "why?")
    order = page.focus_order()
    assert order[:6] == ["Skip to the question", "model", "compare", "look-tab", "fresh", "theme"]
    assert order[6:8] == ["settings-button", "Edit"] and order[9:] == ["Copy", "Retry", "add", "question", "send"]
