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
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch

from tinyllava_fast.bench import machine, report
from tinyllava_fast.bench.infer_peer import Peer
from tinyllava_fast.bench.progress import progress
from tinyllava_fast.bench.report import Report
from tinyllava_fast.bench.samples import read_easy_vqa
from tinyllava_fast.bench.settings import InferSettings
from tinyllava_fast.bench.timing import Series, speedup, turns
from tinyllava_fast.config.load import load_run
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.fast_model.prepare import prepare_model
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.models.build import build_image_processor, build_model, build_tokenizer

PADDED_BATCH = 8
PERCENTILES = (50, 95, 99)

Question = tuple[str, str]  # image file, text


@dataclass
class Sides:
    """Our engine and the peer over the same weights."""

    engine: Engine
    peer: Peer


def build(config: Path, dtype: str, *, weights: str | None = None, compile: bool = False) -> Sides:
    """Build both sides of a workload's model, on its device. UserError for a model that the peer cannot express."""
    run = load_run(config)
    device = machine.pick_device(run.engine.device)
    lmm = build_model(run.model, seed=run.seed, dtype=torch.float32).eval()
    tokenizer, processor = build_tokenizer(run.model), build_image_processor(run.model)
    template = TEMPLATES.get(run.stages[-1].data.template)  # the first one's may leave the questions out
    peer = Peer(lmm, tokenizer, processor, template, run.model.vision.feature_layer, machine.DTYPES[dtype], device)
    lmm.to(device, machine.DTYPES[dtype])
    model = prepare_model(lmm, weights)  # as tinyllava_fast.load does
    engine = Engine(model, tokenizer, processor, template, compile=compile)
    return Sides(engine, peer)


def easy_vqa(count: int, per_image: int) -> list[Question]:
    """Return easy-VQA's first questions, ``per_image`` of each image with so many. UserError if there are too few."""
    questions, images = read_easy_vqa("tlf-bench infer")
    found = [
        (str(images[image]), text)
        for image, asked in sorted(questions.items())
        if len(asked) >= per_image
        for text, _ in asked[:per_image]
    ]
    if len(found) < count:
        raise UserError(f"--questions {count}: easy-VQA has {len(found)} with {per_image} an image; lower it")
    return found[:count]


def requests(questions: Sequence[Question], new_tokens: int) -> list[Request]:
    """Return the questions as our engine takes them, with answers of exactly so many tokens."""
    sampling = Sampling(max_new_tokens=new_tokens, eos_token_id=())
    return [Request.ask(text, image, sampling=sampling) for image, text in questions]


def benchmark(config: Path, settings: InferSettings) -> Report:
    """Measure everything and return the report.

    Ratios are of medians, more than 1 where ours answers more; latencies are ours over the peer's. spread holds the
    per-round ratios. ratio_one_question_per_image and one_per_image are of questions that share no image.
    """
    sides = build(config, settings.dtype, weights=settings.weights, compile=settings.compile)
    device = sides.peer.model.device.type
    many = easy_vqa(settings.questions, settings.per_image)
    single = easy_vqa(settings.questions, 1)
    rates = {"many": throughput(sides, many, settings), "one": throughput(sides, single, settings)}
    waits = {
        side: {kind: percentiles(values) for kind, values in kinds.items()}
        for side, kinds in latency(sides, single, settings).items()
    }
    agree = {settings.dtype: agreement(sides, many, settings)}
    if settings.agreement and settings.dtype != "float32":
        del sides
        agree["float32"] = agreement(build(config, "float32"), many, settings)
    spread = {
        f"{case}_{peer}": speedup(series[peer], series["ours"])
        for case, series in rates.items()
        for peer in ("batched", "batch1")
    }
    return {
        "ratio_batched_peer": spread["many_batched"]["ratio"],
        "ratio_batch1_peer": spread["many_batch1"]["ratio"],
        "ratio_one_question_per_image": spread["one_batched"]["ratio"],
        "ratio_one_question_per_image_batch1": spread["one_batch1"]["ratio"],
        "ttft_ratio": waits["ours"]["first"]["p50_s"] / waits["peer"]["first"]["p50_s"],
        "per_token_ratio": waits["ours"]["next"]["p50_s"] / waits["peer"]["next"]["p50_s"],
        "greedy_agreement_fp32": agree["float32"]["ours"] if "float32" in agree else None,
        "agreement_bf16": agree.get("bfloat16"),
        "questions_per_s": {
            f"{case}_per_image": {side: 1 / series.median for side, series in sides_of.items()}
            for case, sides_of in rates.items()
        },
        "latency": waits,
        "peer": "transformers LlavaForConditionalGeneration.generate, sdpa, left-padded batches of 8",
        "spread": spread,
        "settings": asdict(settings),
        "machine": machine.describe(device),
    }


def throughput(sides: Sides, questions: Sequence[Question], settings: InferSettings) -> dict[str, Series]:
    """Return the seconds per question of "ours", "batched" and "batch1", one entry a round, taken in turns."""
    few, fewer = spaced(questions, settings.peer_questions), spaced(questions, settings.single_questions)

    def ours(asked: Sequence[Question]) -> None:
        produced = sum(len(a.tokens) for a in sides.engine.run(requests(asked, settings.new_tokens)))
        assert produced == len(asked) * settings.new_tokens  # noqa: S101 the work of both sides is the same

    prepared, lone = sides.peer.prepare(few), sides.peer.prepare(fewer)
    runs: dict[str, tuple[Callable[[], object], int]] = {
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


def latency(sides: Sides, questions: Sequence[Question], settings: InferSettings) -> dict[str, dict[str, list[float]]]:
    """Return the seconds to the "first" token and between the "next", of "ours" and of the "peer" at batch 1."""
    stamps: list[float] = []
    logits = sides.engine.model.logits

    wait = machine.device_sync(sides.peer.model.device.type) or (lambda: None)

    def stamped(hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = logits(hidden)
        wait()
        stamps.append(time.perf_counter())
        return result

    def ours(question: Question) -> list[float]:
        stamps.clear()
        began = time.perf_counter()
        sides.engine.answers(requests([question], settings.latency_tokens))
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


def agreement(sides: Sides, questions: Sequence[Question], settings: InferSettings) -> dict[str, float]:
    """Return the shares of identical greedy answers: ours and the batched peer, each against the peer at batch 1."""
    asked = spaced(questions, settings.peer_questions)
    ours = [a.tokens for a in sides.engine.answers(requests(asked, settings.new_tokens))]
    prepared = sides.peer.prepare(asked)
    alone = sides.peer.answer(prepared, 1, settings.new_tokens)
    padded = sides.peer.answer(prepared, PADDED_BATCH, settings.new_tokens)

    def same(answers: list[list[int]]) -> float:
        return sum(a == b for a, b in zip(answers, alone, strict=True)) / len(alone)

    return {"ours": same(ours), "batched_peer": same(padded), "questions": len(asked)}


def spaced(questions: Sequence[Question], count: int) -> list[Question]:
    """Return that many of the questions, evenly spaced, or all."""
    count = min(count, len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p95 and p99 in seconds, by linear interpolation."""
    quantiles = torch.tensor([p / 100 for p in PERCENTILES], dtype=torch.float64)
    found = torch.quantile(torch.tensor(values, dtype=torch.float64), quantiles).tolist()
    return {f"p{p}_s": value for p, value in zip(PERCENTILES, found, strict=True)}


def show(result: Report) -> None:
    """Print the report as tables."""
    names = {"ours": "tinyllava_fast", "batched": "transformers, batches of 8", "batch1": "transformers, batch 1"}
    rows = []
    for side, name in names.items():
        row = [name]
        for case in ("many", "one"):
            row.append(f"{result['questions_per_s'][f'{case}_per_image'][side]:.2f}")
            spread = "{ratio:.2f}x ({min:.2f} .. {max:.2f})" if side != "ours" else ""
            row.append(report.fill(spread, result["spread"].get(f"{case}_{side}", {})))
        rows.append(row)
    settings = result["settings"]
    columns = ["questions/s", f"{settings['per_image']} an image", "ours is", "1 an image", "ours is"]
    report.show(f"Answers of {settings['new_tokens']} tokens, {settings['dtype']}", columns, rows)
    waits = [
        [f"{names['ours'] if side == 'ours' else names['batch1']}, {text}"]
        + [report.seconds(kinds[kind][f"p{p}_s"]) for p in PERCENTILES]
        for kind, text in (("first", "first token"), ("next", "per token"))
        for side, kinds in result["latency"].items()
    ]
    title = "One request: first token {ttft_ratio:.2f}x, per token {per_token_ratio:.2f}x the peer's"
    report.show(report.fill(title, result), ["", *(f"p{p}" for p in PERCENTILES)], waits)
    half = result["agreement_bf16"] or {}
    shares = {
        "float32": result["greedy_agreement_fp32"],
        "bfloat16": half.get("ours"),
        "bfloat16, peer in batches of 8": half.get("batched_peer"),
    }
    found = [{"name": name, "share": share} for name, share in shares.items() if share is not None]
    title = "Greedy answers identical to the peer's at batch 1"
    report.table(title, {"": "{name}", "share": "{share:.1 %}"}, found)
