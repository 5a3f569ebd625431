"""Normalization and accuracy equal the reference's on every vector."""

from __future__ import annotations

import pytest

from tests.eval.golden import load
from tinyllava_fast.eval.vqa_text import (
    CONTRACTIONS,
    m4c_accuracy,
    normalize_m4c,
    normalize_official,
    official_accuracy,
)


def test_normalization_vectors():
    vectors = load("vqa/normalise.jsonl")
    assert len(vectors) == 178 and len(CONTRACTIONS) == 120
    assert [normalize_m4c(v["raw"]) for v in vectors] == [v["m4c"] for v in vectors]
    assert [normalize_official(v["raw"]) for v in vectors] == [v["vqa_eval"] for v in vectors]


def test_accuracy_vectors():
    vectors, means = load("vqa/accuracy.jsonl"), load("vqa/accuracy_expected.json")
    for name, mean, score in (
        ("textvqa_m4c_accuracy", "textvqa_m4c_mean_percent", m4c_accuracy),
        ("vqa_eval_accuracy", "vqa_eval_mean_percent", official_accuracy),
        (
            "vqa_eval_accuracy_of_m4c_prediction",
            "vqa_eval_of_m4c_mean_percent",
            lambda p, a: official_accuracy(normalize_m4c(p), a),
        ),
    ):
        scores = [score(v["prediction"], v["answers"]) for v in vectors]
        assert scores == pytest.approx([v[name] for v in vectors], abs=1e-12)
        assert round(100 * sum(scores) / len(scores), 6) == means[mean]


def test_ten_answers_are_needed():
    with pytest.raises(ValueError, match="9 answers"):
        m4c_accuracy("a", ["a"] * 9)
