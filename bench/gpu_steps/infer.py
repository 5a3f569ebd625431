"""Generation of 1, 8 and 64 sequences, prefill and decoding apart, against transformers' generate in one batch.

Both write exactly as many tokens. Prefill is the time to all first tokens; a token of decoding is what an answer of
many tokens takes beyond one of a single token.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tinyllava_fast.bench import infer
from tinyllava_fast.bench.gpu_job import STEPS, Job
from tinyllava_fast.bench.gpu_workload import SMALL, write_workload
from tinyllava_fast.bench.settings import InferSettings
from tinyllava_fast.bench.timing import Series, turns

STREAMS = (1, 8, 64)
NEW_TOKENS = 64
ROUNDS = 3
ITEM_S = 40
AGREE = 0.9
"""Share of greedy answers that must be transformers' own in float32: an answer differs where two logits all but tie."""


@STEPS.register("infer")
def run(job: Job) -> None:
    """Compare answers in float32, then the times in bfloat16."""
    config = write_workload(job.scratch, SMALL, device=job.device, tiny=job.tiny)
    few = InferSettings(peer_questions=2 if job.tiny else 16, new_tokens=4 if job.tiny else 16)

    def agree(name: str) -> None:
        shares = infer.agreement(infer.build(config, "float32"), infer.easy_vqa(few.peer_questions, 1), few)
        job.tell(name, ok=shares["ours"] >= AGREE, **shares)

    job.each(["answers equal to transformers', float32"], ITEM_S, agree)
    built: list[infer.Sides] = []

    def race(name: str) -> None:
        if not built:
            built.append(infer.build(config, "float32" if job.tiny else "bfloat16"))
        count, tokens = int(name.split()[0]), 4 if job.tiny else NEW_TOKENS
        for side, times in measure(built[0], count, tokens, 1 if job.tiny else ROUNDS).items():
            first, rest = times["first"].median, times["all"].median - times["first"].median
            job.tell(
                f"{name}, {side}",
                prefill_ms=1e3 * first,
                token_ms=1e3 * rest / (tokens - 1),
                tokens_per_s=count * (tokens - 1) / rest if rest > 0 else None,
                all_tokens_per_s=count * tokens / times["all"].median,
            )

    job.each([f"{n} sequences" for n in (STREAMS[:1] if job.tiny else STREAMS)], ITEM_S, race)
    job.tell("vLLM", absent="not among what is carried: it is too large, and brings a torch of its own")


def measure(sides: infer.Sides, count: int, tokens: int, rounds: int) -> dict[str, dict[str, Series]]:
    """Return {side: {"first", "all"}}: seconds to one token, and to so many, of ``count`` questions at once."""
    questions = infer.easy_vqa(count, 1)
    prepared = sides.peer.prepare(questions)

    def ours(new: int) -> None:
        sides.engine.answers(infer.requests(questions, new))

    def peer(new: int) -> None:
        sides.peer.answer(prepared, count, new)

    runs: dict[str, Callable[[int], None]] = {"ours": ours, "transformers": peer}
    seconds: dict[str, dict[str, list[float]]] = {side: {"first": [], "all": []} for side in runs}
    for side in runs.values():
        side(tokens)  # graphs, kernels and memory
    for index in range(rounds):
        for side in turns(list(runs), index):
            for what, new in (("first", 1), ("all", tokens)):
                began = time.perf_counter()  # the answers are on the host when it returns
                runs[side](new)
                seconds[side][what].append(time.perf_counter() - began)
    return {side: {what: Series(tuple(s)) for what, s in both.items()} for side, both in seconds.items()}
