"""`tlf-bench infer`: answers a second and latency against transformers' ``generate``, interleaved in one process.

Both sides have the same weights and dtype, decode greedily and write exactly as many tokens (no end token), so the work
is equal. Choices in the peer's favour: its prompts are tokenized and its images decoded and preprocessed beforehand, in
ours all of that is timed. "batched" is left-padded batches of 8, "batch1" one question after the other, as TinyLLaVA
Factory evaluates. The peers answer an evenly spaced part of our questions in each round: their time per question does
not depend on how many there are, ours does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tinyllava_fast.bench import machine, report
from tinyllava_fast.bench.infer_peer import Peer
from tinyllava_fast.bench.progress import progress
from tinyllava_fast.bench.timing import Series, at_least_one, speedup, turns
from tinyllava_fast.config.load import load_run
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.fast_model.prepare import prepare_model
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.models.build import build_image_processor, build_model, build_tokenizer

WORKLOAD = Path(__file__).parent / "workloads" / "smollm2.yaml"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PADDED_BATCH = 8
PERCENTILES = (50, 95, 99)

Question = tuple[str, str]  # image file, text


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a comparison. Raises UserError for a value that measures nothing."""

    questions: int = 600  # that ours answers in a round
    per_image: int = 10
    peer_questions: int = 32  # of them the batched peer answers in a round, and
    single_questions: int = 8  # of them the peer of batch 1
    rounds: int = 3
    requests: int = 10  # single requests timed for latency
    new_tokens: int = 16
    latency_tokens: int = 32
    dtype: str = "bfloat16"
    weights: str | None = None  # of our language model; None: dense
    compile: bool = False
    agreement: bool = True  # also compare the answers in float32
    quick: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype {self.dtype!r}; {nearest(self.dtype, DTYPES)}")
        at_least_one(self, "questions", "peer_questions", "single_questions", "rounds", "requests")


@dataclass
class Sides:
    """Our engine and the peer over the same weights."""

    engine: Engine
    peer: Peer


def build(config: Path, dtype: str, *, weights: str | None = None, compile: bool = False) -> Sides:
    """Both sides of a workload's model. UserError for a model that the peer cannot express."""
    run = load_run(config)
    lmm = build_model(run.model, seed=run.seed, dtype=torch.float32).eval()
    tokenizer, processor = build_tokenizer(run.model), build_image_processor(run.model)
    template = TEMPLATES.get(run.stages[0].data.template)
    peer = Peer(lmm, tokenizer, processor, template, run.model.vision.feature_layer, DTYPES[dtype])
    lmm.to(DTYPES[dtype])
    model = prepare_model(lmm, weights)  # as tinyllava_fast.load does
    engine = Engine(model, tokenizer, processor, template, compile=compile)
    return Sides(engine, peer)


def easy_vqa(count: int, per_image: int) -> list[Question]:
    """The first questions of easy-VQA, ``per_image`` of each image that has so many. UserError if there are too few."""
    try:
        import easy_vqa as source
    except ModuleNotFoundError:
        raise UserError("tlf-bench infer takes its questions from easy-VQA; run `pip install easy-vqa`") from None
    paths = source.get_train_image_paths()
    by_image: dict[int, list[str]] = {}
    for text, _, image in zip(*source.get_train_questions(), strict=True):
        by_image.setdefault(image, []).append(text)
    found = [
        (str(paths[image]), text)
        for image, texts in sorted(by_image.items())
        if len(texts) >= per_image
        for text in texts[:per_image]
    ]
    if len(found) < count:
        raise UserError(f"--questions {count}: easy-VQA has {len(found)} with {per_image} an image; lower it")
    return found[:count]


def benchmark(config: Path = WORKLOAD, settings: Settings | None = None) -> dict[str, Any]:
    """Measure everything and return the report (see ``compose_report``)."""
    settings = settings or Settings()
    sides = build(config, settings.dtype, weights=settings.weights, compile=settings.compile)
    many = easy_vqa(settings.questions, settings.per_image)
    single = easy_vqa(settings.questions, 1)
    measured = {
        "many_per_image": throughput(sides, many, settings),
        "one_per_image": throughput(sides, single, settings),
        "latency": latency(sides, single, settings),
        "agreement": {settings.dtype: agreement(sides, many, settings)},
    }
    if settings.agreement and settings.dtype != "float32":
        del sides
        exact = build(config, "float32")
        measured["agreement"]["float32"] = agreement(exact, many, settings)
    facts = machine.describe("cpu")
    return compose_report(measured, facts, settings)


def throughput(sides: Sides, questions: Sequence[Question], settings: Settings) -> dict[str, Series]:
    """Seconds per question of "ours", "batched" and "batch1", one entry a round, taken in turns."""
    few, fewer = spaced(questions, settings.peer_questions), spaced(questions, settings.single_questions)
    sampling = Sampling(max_new_tokens=settings.new_tokens, eos_token_id=())

    def ours(asked: Sequence[Question]) -> None:
        requests = [Request.ask(text, image, sampling=sampling) for image, text in asked]
        produced = sum(len(a.tokens) for a in sides.engine.run(requests))
        assert produced == len(asked) * settings.new_tokens  # noqa: S101 the work of both sides is the same

    prepared, lone = sides.peer.prepare(few), sides.peer.prepare(fewer)
    runs: dict[str, tuple[Callable[[], Any], int]] = {
        "ours": (lambda: ours(questions), len(questions)),
        "batched": (lambda: sides.peer.answer(prepared, PADDED_BATCH, settings.new_tokens), len(few)),
        "batch1": (lambda: sides.peer.answer(lone, 1, settings.new_tokens), len(fewer)),
    }
    ours(few)  # compiles, and first touches memory
    sides.peer.answer(prepared[:PADDED_BATCH], PADDED_BATCH, 2)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    each = [name for index in range(settings.rounds) for name in turns(list(runs), index)]
    for name in progress(each, f"turns, {len({image for image, _ in questions})} images"):
        run, count = runs[name]
        began = time.perf_counter()
        run()
        seconds[name].append((time.perf_counter() - began) / count)
    return {name: Series(tuple(values)) for name, values in seconds.items()}


def latency(sides: Sides, questions: Sequence[Question], settings: Settings) -> dict[str, dict[str, list[float]]]:
    """{"ours" | "peer": {"first": [...], "next": [...]}}: seconds to the first token and between tokens, batch 1."""
    sampling = Sampling(max_new_tokens=settings.latency_tokens, eos_token_id=())
    stamps: list[float] = []
    logits = sides.engine.model.logits

    def stamped(hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = logits(hidden)
        stamps.append(time.perf_counter())
        return result

    def ours(question: Question) -> list[float]:
        stamps.clear()
        began = time.perf_counter()
        sides.engine.answers([Request.ask(question[1], question[0], sampling=sampling)])
        return [began, *stamps]

    asked = spaced(questions, settings.requests)
    prepared = sides.peer.prepare(asked)
    series: dict[str, dict[str, list[float]]] = {s: {"first": [], "next": []} for s in ("ours", "peer")}
    sides.engine.model.logits = stamped  # type: ignore[method-assign]
    try:
        ours(asked[0])
        pairs = list(zip(asked, prepared, strict=True))
        for index, (question, sample) in enumerate(progress(pairs, "single requests")):
            for side in turns(["ours", "peer"], index):
                times = ours(question) if side == "ours" else sides.peer.stamps(sample, settings.latency_tokens)
                gaps = [b - a for a, b in pairwise(times)]
                series[side]["first"].append(gaps[0])
                series[side]["next"] += gaps[1:]
    finally:
        del sides.engine.model.logits
    return series


def agreement(sides: Sides, questions: Sequence[Question], settings: Settings) -> dict[str, float]:
    """Shares of identical greedy answers: ours and the batched peer, each against the peer at batch 1."""
    asked = spaced(questions, settings.peer_questions)
    sampling = Sampling(max_new_tokens=settings.new_tokens, eos_token_id=())
    requests = [Request.ask(text, image, sampling=sampling) for image, text in asked]
    ours = [a.tokens for a in sides.engine.answers(requests)]
    prepared = sides.peer.prepare(asked)
    alone = sides.peer.answer(prepared, 1, settings.new_tokens)
    padded = sides.peer.answer(prepared, PADDED_BATCH, settings.new_tokens)

    def same(answers: list[list[int]]) -> float:
        return sum(a == b for a, b in zip(answers, alone, strict=True)) / len(alone)

    return {"ours": same(ours), "batched_peer": same(padded), "questions": len(asked)}


def spaced(questions: Sequence[Question], count: int) -> list[Question]:
    """That many of the questions, evenly spaced, or all."""
    count = min(count, len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in seconds, by linear interpolation."""
    quantiles = torch.tensor([p / 100 for p in PERCENTILES], dtype=torch.float64)
    found = torch.quantile(torch.tensor(values, dtype=torch.float64), quantiles).tolist()
    return {f"p{p}_s": value for p, value in zip(PERCENTILES, found, strict=True)}


def compose_report(measured: dict[str, Any], facts: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The JSON. Ratios are of medians, more than 1 where ours answers more; latencies are ours over the peer's.

    spread holds the per-round ratios. ratio_one_question_per_image and one_per_image are of questions that share no
    image.
    """
    many, one, waits = measured["many_per_image"], measured["one_per_image"], measured["latency"]
    spread = {
        f"{case}_{peer}": speedup(series[peer], series["ours"])
        for case, series in (("many", many), ("one", one))
        for peer in ("batched", "batch1")
    }
    shown = {side: {kind: percentiles(values) for kind, values in waits[side].items()} for side in waits}
    agree = measured["agreement"]
    return {
        "ratio_batched_peer": spread["many_batched"]["ratio"],
        "ratio_batch1_peer": spread["many_batch1"]["ratio"],
        "ratio_one_question_per_image": spread["one_batched"]["ratio"],
        "ratio_one_question_per_image_batch1": spread["one_batch1"]["ratio"],
        "ttft_ratio": shown["ours"]["first"]["p50_s"] / shown["peer"]["first"]["p50_s"],
        "per_token_ratio": shown["ours"]["next"]["p50_s"] / shown["peer"]["next"]["p50_s"],
        "greedy_agreement_fp32": agree["float32"]["ours"] if "float32" in agree else None,
        "agreement_bf16": agree.get("bfloat16"),
        "questions_per_s": {
            case: {side: 1 / series.median for side, series in sides.items()}
            for case, sides in (("many_per_image", many), ("one_per_image", one))
        },
        "latency": shown,
        "peer": "transformers LlavaForConditionalGeneration.generate, sdpa, left-padded batches of 8",
        "spread": spread,
        "settings": asdict(settings),
        "machine": facts,
    }


def show(result: dict[str, Any]) -> None:
    """The report as tables."""
    names = {"ours": "tinyllava_fast", "batched": "transformers, batches of 8", "batch1": "transformers, batch 1"}
    rates, spread = result["questions_per_s"], result["spread"]
    rows = []
    for side, name in names.items():
        row = [name]
        for case, short in (("many_per_image", "many"), ("one_per_image", "one")):
            row.append(f"{rates[case][side]:.2f}")
            ratio = spread.get(f"{short}_{side}")
            row.append("" if ratio is None else f"{ratio['ratio']:.2f}x ({ratio['min']:.2f} .. {ratio['max']:.2f})")
        rows.append(row)
    per_image = result["settings"]["per_image"]
    columns = ["questions/s", f"{per_image} an image", "ours is", "1 an image", "ours is"]
    report.show(f"Answers of {result['settings']['new_tokens']} tokens, {result['settings']['dtype']}", columns, rows)
    waits = [
        [f"{names['ours'] if side == 'ours' else names['batch1']}, {text}"]
        + [report.seconds(kinds[kind][f"p{p}_s"]) for p in PERCENTILES]
        for kind, text in (("first", "first token"), ("next", "per token"))
        for side, kinds in result["latency"].items()
    ]
    title = (
        f"One request: first token {result['ttft_ratio']:.2f}x, per token {result['per_token_ratio']:.2f}x the peer's"
    )
    report.show(title, ["", *(f"p{p}" for p in PERCENTILES)], waits)
    agree = {"float32": result["greedy_agreement_fp32"], "bfloat16": (result["agreement_bf16"] or {}).get("ours")}
    padded = (result["agreement_bf16"] or {}).get("batched_peer")
    rows = [[dtype, f"{100 * share:.1f} %"] for dtype, share in agree.items() if share is not None]
    if padded is not None:
        rows.append(["bfloat16, peer in batches of 8", f"{100 * padded:.1f} %"])
    report.show("Greedy answers identical to the peer's at batch 1", ["", "share"], rows)


def quick(settings: Settings) -> Settings:
    """The least that shows that the command works; its numbers mean nothing."""
    return replace(
        settings, questions=4, per_image=2, peer_questions=2, single_questions=1, rounds=1, requests=1, new_tokens=2,
        latency_tokens=3, quick=True,
    )  # fmt: skip
