"""The server under load: many clients that ask one question after another, against the engine alone.

The clients are threads of this process and speak HTTP as any other: images as data URIs, answers streamed. The server
is a process of its own on the same machine, so the clients take a part of its processor. What the clients were answered
is then asked of the engine alone, as one run.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count, pairwise
from pathlib import Path
from statistics import median

import psutil
from PIL import Image

from tinyllava_fast.bench import machine, report
from tinyllava_fast.bench.infer import Question, easy_vqa, percentiles, requests
from tinyllava_fast.bench.model_folder import write_model
from tinyllava_fast.bench.report import Report
from tinyllava_fast.bench.settings import ServeSettings
from tinyllava_fast.config.load import load_run
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.assistant import Assistant
from tinyllava_fast.log import log

START_S = 180.0  # most time until the server answers
SETTLED_S = 10.0  # from then on its memory must not grow
WINDOW_S = 10.0  # its memory at the beginning and at the end is that of so long
WAIT_S = 600.0  # for one piece of an answer


@dataclass
class Tally:
    """The observations of all clients. Times are in seconds."""

    answered: list[Question] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    rejected: int = 0
    errors: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0


def benchmark(config: Path, settings: ServeSettings) -> Report:
    """Measure both sides.

    Returns requests_per_s, offline_requests_per_s, ratio_offline, percentiles of the times to the first token, between
    pieces and of whole answers, what ``memory_growth`` says of the server's resident memory, cache_hit_rate (tokens of
    prompts that were not computed), errors, rejected, and the settings.
    """
    run = load_run(config)
    questions = easy_vqa(settings.questions, settings.per_image)
    with tempfile.TemporaryDirectory(prefix="tlf-serve-") as folder:
        model = write_model(run, Path(folder) / "model", machine.DTYPES[settings.dtype])
        with _server(model) as (process, port):
            tally, memory, seconds = _load(process, port, questions, settings)
        assistant = Assistant.from_pretrained(model)
        list(assistant.engine.run(requests(questions[:2], settings.new_tokens)))
        began = time.perf_counter()
        list(assistant.engine.run(requests(tally.answered, settings.new_tokens)))
        offline = len(tally.answered) / (time.perf_counter() - began)
    rate = len(tally.answered) / seconds
    return {
        "requests_per_s": rate,
        "offline_requests_per_s": offline,
        "ratio_offline": rate / offline,
        "answers": len(tally.answered),
        **_named("ttft", tally.first),
        **_named("itl", tally.gaps),
        **_named("e2e", tally.whole),
        **memory,
        "cache_hit_rate": tally.cached_tokens / max(1, tally.prompt_tokens),
        "rejected": tally.rejected,
        "errors": len(tally.errors),
        "first_errors": tally.errors[:3],
        "settings": asdict(settings),
        "machine": machine.describe("cpu"),
    }


def _named(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}_{key.removesuffix('_s')}": value for key, value in percentiles(values).items()}


@contextmanager
def _server(folder: Path) -> Iterator[tuple[psutil.Process, int]]:
    """Start `tlf-serve` on a free port and stop it at the end. UserError if it does not come up or go down well."""
    command = [sys.executable, "-m", "tinyllava_fast.serve.cli", str(folder), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None  # noqa: S101 it is piped
        timer = threading.Timer(START_S, process.kill)
        timer.start()
        try:
            port = 0
            for line in process.stderr:
                if found := re.search(r"http://[^ ]*:(\d+)", line):
                    port = int(found[1])
                    break
            timer.cancel()
            if not port:
                raise UserError("tlf-serve did not start; run it by itself to see why")
            rest = threading.Thread(target=process.stderr.read, daemon=True)  # a full pipe would stop it
            rest.start()
            yield psutil.Process(process.pid), port
            process.send_signal(signal.SIGTERM)
            if process.wait(120) != 0:
                raise UserError(f"tlf-serve ended with exit code {process.returncode} after SIGTERM")
        finally:
            timer.cancel()
            process.kill()


def _load(
    process: psutil.Process, port: int, questions: Sequence[Question], settings: ServeSettings
) -> tuple[Tally, dict[str, float], float]:
    """Let the clients ask; returns what they saw, ``memory_growth`` of the server, and the seconds it took."""
    tally, lock, numbers = Tally(), threading.Lock(), count()
    bodies = [_body(question, settings) for question in questions]
    began = time.perf_counter()
    until = began + settings.seconds

    def client() -> None:
        while time.perf_counter() < until:
            number = next(numbers) % len(questions)
            try:
                seen = _ask(port, bodies[number])
            except (OSError, http.client.HTTPException, ValueError) as error:
                with lock:
                    tally.errors.append(f"{type(error).__name__}: {error}")
                continue
            with lock:
                _add(tally, questions[number], seen)
            if isinstance(seen, float):
                time.sleep(min(seen, max(0.0, until - time.perf_counter())))

    threads = [threading.Thread(target=client, daemon=True) for _ in range(settings.clients)]
    for thread in threads:
        thread.start()
    memory: list[tuple[float, int]] = []
    while any(thread.is_alive() for thread in threads):
        memory.append((time.perf_counter() - began, process.memory_info().rss))
        time.sleep(0.5)
    seconds = time.perf_counter() - began
    log.info("%d answers in %.0f s", len(tally.answered), seconds)
    return tally, memory_growth(memory, settings.seconds), seconds


def memory_growth(samples: Sequence[tuple[float, int]], seconds: float) -> dict[str, float]:
    """Compare the resident memory from 10 s to 20 s of a load of ``seconds`` with that of its last 10 s.

    samples: (seconds since the load began, bytes). A pass takes memory for its time, so one sample says little.
    Returns rss_before and rss_after, the medians in bytes; rss_growth, the second over the first, less 1; and the same
    of the smallest (between passes) and of the largest samples: rss_growth_least, rss_growth_most. What comes after the
    load has no part in it. A load below 40 s has shorter windows, a quarter of it each.
    """
    window, begin = min(WINDOW_S, seconds / 4), min(SETTLED_S, seconds / 4)
    ends = (begin + window, seconds)
    first, last = ([size for at, size in samples if stop - window <= at < stop] for stop in ends)
    first, last = first or [samples[0][1]], last or [samples[-1][1]]
    before, after = median(first), median(last)
    return {
        "rss_before": before,
        "rss_after": after,
        "rss_growth": after / before - 1,
        "rss_growth_least": min(last) / min(first) - 1,
        "rss_growth_most": max(last) / max(first) - 1,
    }


@dataclass
class _Seen:
    """One answer as a client saw it: when it asked, when pieces came, and the usage that the server told."""

    asked: float
    stamps: list[float]
    prompt_tokens: int
    cached_tokens: int


def _add(tally: Tally, question: Question, seen: _Seen | float | str) -> None:
    if isinstance(seen, str):
        tally.errors.append(seen)
    elif isinstance(seen, float):
        tally.rejected += 1
    else:
        tally.answered.append(question)
        tally.first.append(seen.stamps[0] - seen.asked)
        tally.gaps += [b - a for a, b in pairwise(seen.stamps)]
        tally.whole.append(seen.stamps[-1] - seen.asked)
        tally.prompt_tokens += seen.prompt_tokens
        tally.cached_tokens += seen.cached_tokens


def _body(question: Question, settings: ServeSettings) -> bytes:
    path, text = question
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": settings.new_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()


def _ask(port: int, body: bytes) -> _Seen | float | str:
    """Ask once. Returns what was seen, the seconds to wait if the queue is full, or what went wrong."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        asked = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status == 429:
            return float(response.headers.get("Retry-After", "1"))
        if response.status != 200:
            return f"status {response.status}: {response.read(300).decode(errors='replace')}"
        stamps: list[float] = []
        usage: Report = {}
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            if any(choice["delta"].get("content") or choice.get("finish_reason") for choice in event["choices"]):
                stamps.append(time.perf_counter())
        if not stamps or not usage:
            return "a stream without an answer or without usage"
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return _Seen(asked, stamps, usage["prompt_tokens"], cached)
    finally:
        connection.close()


def show(result: Report) -> None:
    """Print the report as tables."""
    title = "{clients} clients for {seconds} s, answers of {new_tokens} tokens, {per_image} questions an image, {dtype}"
    columns = {
        "answers": "{answers}",
        "answers/s": "{requests_per_s:.2f}",
        "engine alone": "{offline_requests_per_s:.2f}",
        "of it": "{ratio_offline:.2f}x",
        "prompt from cache": "{cache_hit_rate:.0 %}",
        "memory": "{rss_after:GiB}",
        "it grew": "{rss_growth:.1 %}",
        "least, most": "{rss_growth_least:.1 %}, {rss_growth_most:.1 %}",
        "429": "{rejected}",
        "errors": "{errors}",
    }
    report.table(report.fill(title, result["settings"]), columns, [result])
    names = {"ttft": "first token", "itl": "between two pieces", "e2e": "whole answer"}
    rows = [[text, *(report.seconds(result[f"{name}_p{p}"]) for p in (50, 95, 99))] for name, text in names.items()]
    report.show("Times that clients see", ["", "p50", "p95", "p99"], rows)
    for error in result["first_errors"]:
        log.warning("%s", error)
