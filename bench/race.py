"""`tlf-bench race`: the engines that people run on a CPU, over one model, in turns.

Every engine lives in an environment and a process of its own and is asked the same questions, greedily, for exactly as
many tokens. A question to one stream has a picture that was not asked about before, so that no cache of prompts helps.
A time per token is what an answer of many tokens takes longer than one of one token, divided by their number.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from tinyllava_fast.bench import machine, report
from tinyllava_fast.bench.infer import Question, easy_vqa
from tinyllava_fast.bench.model_folder import write_model
from tinyllava_fast.bench.race_process import Process, export, load_peer
from tinyllava_fast.bench.race_settings import RaceSettings
from tinyllava_fast.bench.report import Report
from tinyllava_fast.bench.timing import turns
from tinyllava_fast.config.load import load_run
from tinyllava_fast.config.schema import RunConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log
from tinyllava_fast.models.build import build_tokenizer

PROMPT_TOKENS = 240
STREAMS = (1, 8, 32)
PER_IMAGE = 10
ROWS = {  # measurement: title, whether less is better
    "first_s": ("first token, one picture", True),
    "next_s": ("a token", True),
    "prompt_tokens_per_s": (f"prompt of {PROMPT_TOKENS} tokens, tokens/s", False),
    **{f"streams_{n}": (f"questions/s, {n} at once", False) for n in STREAMS},
    "ten_an_image": (f"questions/s, {PER_IMAGE} an image", False),
    "peak_bytes": ("peak memory", True),
    "start_s": ("process to first token", True),
}


def benchmark(config: Path, settings: RaceSettings) -> Report:
    """Measure everything and return the report.

    results: {precision: {peer: {measurement: [one a round]}}}. ratios: {precision: {measurement: ours over the best
    other peer}}, more than 1 where ours is better. problems: {precision: {peer: why it was not measured}}.
    """
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    agree: dict[str, Report] = {}
    problems: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="tlf-race-") as folder:
        run = load_run(config)
        model = write_model(run, Path(folder) / "model", torch.bfloat16)
        prompt = _prompt(run)
        for precision in dict.fromkeys(settings.precision):
            problems[precision] = {}
            found = _race(model, precision, prompt, settings, problems[precision])
            results[precision], agree[precision] = found
    return {
        "results": results,
        "ratios": {precision: ratios(found) for precision, found in results.items()},
        "agreement": agree,
        "problems": problems,
        "peers": {name: {"title": load_peer(name).TITLE, "cannot": load_peer(name).CANNOT} for name in settings.peer},
        "settings": asdict(settings),
        "machine": machine.describe("cpu"),
    }


def _prompt(run: RunConfig) -> str:
    """Return a text of about PROMPT_TOKENS tokens, which are counted without the template's."""
    tokenizer = build_tokenizer(run.model)
    words = [f"{index} apples and" for index in range(PROMPT_TOKENS)]
    ids = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"][:PROMPT_TOKENS]
    return str(tokenizer.decode(ids))


def _race(
    model: Path, precision: str, prompt: str, settings: RaceSettings, problems: dict[str, str]
) -> tuple[dict[str, dict[str, list[float]]], Report]:
    """Return {peer: measurements} of one precision, and how far the peers' answers agree with the first peer's."""
    asked = _fresh()
    found: dict[str, dict[str, list[float]]] = {}
    alive: dict[str, Process] = {}
    with ExitStack() as stack:
        for name in dict.fromkeys(settings.peer):
            try:
                target = export(name, model, precision, model.parent / f"{name}-{precision}")
                process = stack.enter_context(Process(name, target, precision, os.cpu_count() or 1))
                process.wait()
                image, text = next(asked)
                process.do("ask", questions=[(text, image)], tokens=1)
                found[name] = {"start_s": [time.perf_counter() - process.began]}
                alive[name] = process
            except UserError as error:
                log.warning("%s", error)
                problems[name] = str(error)
        agree = _agreement(alive, settings) if alive else {}
        for index in range(settings.rounds):
            for name in turns(list(alive), index) if alive else []:
                log.info("%s, round %d: %s", precision, index + 1, name)
                try:
                    for key, value in measure(alive[name], asked, f"{index}. {prompt}", settings).items():
                        found[name].setdefault(key, []).append(value)
                except UserError as error:
                    log.warning("%s", error)
                    problems[name] = str(error)
                    del alive[name], found[name]
    return found, agree


def _fresh() -> Iterator[Question]:
    """Yield questions, each about another picture, and begin again when there is none left."""
    while True:
        yield from easy_vqa(1000, 1)


def measure(process: Process, asked: Iterator[Question], prompt: str, settings: RaceSettings) -> dict[str, float]:
    """Return one round of a peer."""

    def seconds(questions: Sequence[tuple[str, str | None]], tokens: int) -> float:
        answers, took = process.do("ask", questions=questions, tokens=tokens)
        if len(answers) != len(questions):
            raise UserError(f"{process.name}: {len(answers)} answers to {len(questions)} questions")
        return float(took)

    def one() -> list[tuple[str, str | None]]:
        image, text = next(asked)
        return [(text, image)]

    first = [seconds(one(), 1) for _ in range(settings.requests)]
    whole = [seconds(one(), settings.latency_tokens) for _ in range(settings.requests)]
    took = {"first_s": statistics.median(first)}
    took["next_s"] = (statistics.median(whole) - took["first_s"]) / (settings.latency_tokens - 1)
    took["prompt_tokens_per_s"] = PROMPT_TOKENS / seconds([(prompt, None)], 1)
    for streams in STREAMS:
        count = max(settings.questions, streams) if not settings.quick else streams
        groups = [[one()[0] for _ in range(streams)] for _ in range(count // streams)]
        took[f"streams_{streams}"] = count / sum(seconds(group, settings.new_tokens) for group in groups)
    many = [(text, image) for image, text in easy_vqa(PER_IMAGE * (1 if settings.quick else 3), PER_IMAGE)]
    took["ten_an_image"] = len(many) / seconds(many, settings.new_tokens)
    took["peak_bytes"] = float(process.do("peak")[0])
    return took


def _agreement(alive: Mapping[str, Process], settings: RaceSettings) -> Report:
    """Return {peer: share of tokens before the first difference, and where it is} against the first peer's answers."""
    questions = [(text, image) for image, text in easy_vqa(4, 1)]
    answers = {
        name: [process.do("ask", questions=[question], tokens=settings.new_tokens)[0][0] for question in questions]
        for name, process in alive.items()
    }
    base = next(iter(answers))
    return {name: compare(answers[base], found) | {"with": base} for name, found in answers.items() if name != base}


def compare(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> dict[str, object]:
    """Return the share of our tokens before the first difference, and its places: one an answer, None if equal.

    >>> compare([[1, 2], [3, 4]], [[1, 2], [3, 5]])
    {'share': 0.75, 'first_difference': [None, 1]}
    """
    places: list[int | None] = []
    for a, b in zip(ours, theirs, strict=True):
        least = min(len(a), len(b))
        differs = next((i for i in range(least) if a[i] != b[i]), least)
        places.append(None if differs == len(a) == len(b) else differs)
    same = sum(len(a) if place is None else place for a, place in zip(ours, places, strict=True))
    return {"share": same / max(1, sum(map(len, ours))), "first_difference": places}


def ratios(found: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Return by how many times ours is better than the best other peer, of medians; empty without both."""
    others = [name for name in found if name != "ours"]
    if "ours" not in found or not others:
        return {}
    result = {}
    for key, (_, less) in ROWS.items():
        ours = statistics.median(found["ours"][key])
        values = [statistics.median(found[name][key]) for name in others]
        result[key] = min(values) / ours if less else ours / max(values)
    return result


def show(result: Report) -> None:
    """Print the report as a table a precision."""
    for precision, found in result["results"].items():
        rows = []
        for key, (title, _) in ROWS.items():
            cells = [_cell(key, measured[key]) for measured in found.values()]
            ratio = result["ratios"][precision].get(key)
            rows.append([title, *cells, "" if ratio is None else f"{ratio:.2f}x"])
        titles = [result["peers"][name]["title"] for name in found]
        report.show(f"Weights in {precision}", ["", *titles, "ours is, of the best"], rows)
        for name, share in result["agreement"][precision].items():
            places = share["first_difference"]
            log.info("%s, %s: %.0f %% of the tokens agree, %s", name, precision, 100 * share["share"], places)
        for name, reason in result["problems"][precision].items():
            log.warning("%s was not measured: %s", name, reason)


def _cell(key: str, values: Sequence[float]) -> str:
    value = statistics.median(values)
    if key.endswith("_s") and not key.endswith("per_s"):
        return report.seconds(value)
    return report.fill("{value:GiB}", {"value": value}) if key == "peak_bytes" else f"{value:.3g}"
