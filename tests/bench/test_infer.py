"""`tlf-bench infer` on a tiny model: both sides do the same work and agree, and the report says what it must."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyllava_fast.bench import cli, infer
from tinyllava_fast.bench.settings import InferSettings
from tinyllava_fast.errors import UserError

pytest.importorskip("easy_vqa")


def test_the_command(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "i.json"
    words = ["infer", "--config", str(config), "--quick", "--dtype", "float32", "--json", str(target)]
    words += ["--plot", str(tmp_path)]
    assert cli.main(words) == 0
    report = json.loads(target.read_text())
    for key in ("ratio_batched_peer", "ratio_batch1_peer", "ratio_one_question_per_image", "ttft_ratio"):
        assert report[key] > 0, key
    assert report["per_token_ratio"] > 0 and set(report["latency"]["ours"]["next"]) == {"p50_s", "p95_s", "p99_s"}
    assert report["greedy_agreement_fp32"] == 1.0 and report["agreement_bf16"] is None
    assert set(report["spread"]) == {"many_batched", "many_batch1", "one_batched", "one_batch1"}
    assert (tmp_path / "infer.png").stat().st_size > 10_000
    assert "transformers, batches of 8" in capsys.readouterr().out


def test_answers_agree_in_float32(config: Path) -> None:
    settings = InferSettings(peer_questions=9, new_tokens=6)
    sides = infer.build(config, "float32")
    assert infer.agreement(sides, infer.easy_vqa(18, 3), settings) == {"ours": 1.0, "batched_peer": 1.0, "questions": 9}


def test_more_questions_than_there_are() -> None:
    with pytest.raises(UserError, match="easy-VQA has"):
        infer.easy_vqa(10**6, 10)
