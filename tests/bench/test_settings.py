"""Settings are flags: what a command line gives, and what measures nothing is refused by the flag's name."""

from __future__ import annotations

import argparse

import pytest

from tinyllava_fast.bench.settings import (
    FitSettings,
    InferSettings,
    OpsSettings,
    PackingSettings,
    ParitySettings,
    ScalingSettings,
    Settings,
    TrainSettings,
)
from tinyllava_fast.errors import UserError


@pytest.mark.parametrize(
    ("kind", "wrong", "said"),
    [
        (TrainSettings, {"mode": "pretain"}, r"--mode 'pretain'.*pretrain"),
        (TrainSettings, {"rounds": 0}, "--rounds 0: at least 1"),
        (ScalingSettings, {"factors": (2,)}, "--factor 2: name at least two"),
        (ScalingSettings, {"factors": (1, 1)}, "--factor 1 1: name at least two"),
        (ScalingSettings, {"factors": (0, 1)}, "--factor 0: at least 1"),
        (ScalingSettings, {"mode": "lorra"}, "--mode 'lorra'"),
        (FitSettings, {"recipes": ("qlra",)}, "--recipe 'qlra'"),
        (FitSettings, {"samples": (2, 2)}, "--samples: two sizes"),
        (FitSettings, {"samples": (0, 1)}, "--samples 0: at least 1"),
        (FitSettings, {"lora_rank": 0}, "--lora-rank 0: at least 1"),
        (ParitySettings, {"seeds": 1}, "--seeds 1: noise"),
        (ParitySettings, {"steps": 0}, "--steps 0: at least 1"),
        (InferSettings, {"dtype": "fp8"}, "--dtype 'fp8'"),
        (InferSettings, {"peer_questions": 0}, "--peer-questions 0: at least 1"),
        (OpsSettings, {"dtype": "bf16"}, "--dtype 'bf16'"),
        (OpsSettings, {"rounds": 0}, "--rounds 0: at least 1"),
        (PackingSettings, {"budgets": (1024,)}, "less than the longest"),
        (PackingSettings, {"text_only": 6.0}, "a share"),
        (PackingSettings, {"records": 0}, "at least 1"),
        (PackingSettings, {"lookahead": 0}, "at least 1"),
        (PackingSettings, {"image_tokens": (2040,)}, "must fit"),
    ],
)
def test_what_measures_nothing_is_refused(kind: type[Settings], wrong: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        kind(**wrong)


def read(kind: type[Settings], *words: str) -> Settings:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    kind.add_to(parser)
    return kind.read(parser.parse_args(words))


def test_flags_are_read() -> None:
    assert read(FitSettings) == FitSettings()
    words = ["--recipe", "lora", "--samples", "2", "--samples", "4", "--limit", "0.5"]
    assert read(FitSettings, *words) == FitSettings(recipes=("lora",), samples=(2, 4), limit=2**29)
    assert read(PackingSettings, "--seed", "0", "--text-only", "1") == PackingSettings(text_only=1.0)
    assert read(InferSettings, "--compile", "--no-agreement") == InferSettings(compile=True, agreement=False)
    assert read(ParitySettings, "--quick", "--steps", "9") == ParitySettings(steps=2, samples=2, seeds=2)
    assert read(OpsSettings, "--op", "splice", "--quick") == OpsSettings(ops=("splice",), quick=True)
