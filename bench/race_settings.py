"""The settings of `tlf-bench race`, which are its flags at the same time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tinyllava_fast.bench.settings import Settings, option

PEERS = ("ours", "openvino_genai_peer", "llama_cpp")
PRECISIONS = ("bf16", "int8", "int4")


@dataclass(frozen=True, kw_only=True)
class RaceSettings(Settings):
    """The settings of `tlf-bench race`."""

    quick_values: ClassVar = {
        "rounds": 1, "requests": 1, "latency_tokens": 3, "new_tokens": 2, "questions": 2, "quick": True,
    }  # fmt: skip

    peer: tuple[str, ...] = option(PEERS, "an engine to measure", metavar="NAME", names=PEERS)
    precision: tuple[str, ...] = option(PRECISIONS, "of the language model's weights", names=PRECISIONS)
    rounds: int = option(3, "timed rounds")
    requests: int = option(5, "single requests of a round")
    latency_tokens: int = option(32, "tokens of an answer whose time a token is measured")
    new_tokens: int = option(16, "tokens of an answer where questions a second are measured")
    questions: int = option(32, "questions of a round at each number of streams")
    quick: bool = False
