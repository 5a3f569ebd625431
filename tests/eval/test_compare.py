"""Two models paired by question, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from tinyllava_fast.errors import UserError
from tinyllava_fast.eval.compare import compare
from tinyllava_fast.eval.results import write_json


def results(folder, credits, benchmark="gqa"):
    """credits: key -> (image, credit)."""
    write_json(folder / "results.json", {"benchmark": benchmark})
    rows = [f'{{"key": "{k}", "images": ["{i}"], "credit": {c}}}' for k, (i, c) in credits.items()]
    (folder / "verdicts.jsonl").write_text("\n".join(rows))
    return folder


def test_by_hand(tmp_path):
    a = results(tmp_path / "a", {"1": ("x", 1), "2": ("x", 0), "3": ("y", 0), "4": ("z", 1), "5": ("z", 1)})
    b = results(tmp_path / "b", {"4": ("z", 0), "3": ("y", 1), "2": ("x", 1), "1": ("x", 1), "6": ("w", 1)})
    found = compare(a, b)
    assert (found.questions, found.only_a, found.only_b) == (4, 1, 1)
    assert (found.a, found.b, found.b_better, found.a_better, found.binary) == (0.5, 0.75, 2, 1, True)
    # differences 0, 1 (image x), 1 (y), -1 (z); mean .25; residuals by image .5, .75, -1.25
    assert found.stderr == pytest.approx(math.sqrt(0.25 + 0.5625 + 1.5625) / 4)
    assert found.p_sign == 1.0
    assert found.p_difference == pytest.approx(math.erfc(0.25 / found.stderr / math.sqrt(2)))
    said = str(found)
    assert "B - A = +25.00" in said and "McNemar" in said and "1 questions of A alone" in said
    mirrored = compare(b, a)
    assert (mirrored.stderr, mirrored.p_sign) == pytest.approx((found.stderr, found.p_sign))


def test_soft_credit_and_one_image(tmp_path):
    a = results(tmp_path / "a", {"1": ("x", 0.3), "2": ("x", 0.6)})
    b = results(tmp_path / "b", {"1": ("x", 0.6), "2": ("x", 1)})
    found = compare(a, b)
    assert found.stderr is None and found.p_difference is None and "exact sign test" in str(found)
    assert compare(a, a).b_better == 0


def test_refusals(tmp_path):
    a = results(tmp_path / "a", {"1": ("x", 1)})
    for other, said in (
        (results(tmp_path / "b", {"1": ("x", 1)}, "pope"), "only one benchmark"),
        (results(tmp_path / "c", {"2": ("x", 1)}), "no scored question in common"),
        (results(tmp_path / "d", {"1": ("x", "null")}), "no scored question in common"),
        (tmp_path / "e.jsonl", "give --data and one name"),
    ):
        with pytest.raises(UserError, match=said):
            compare(a, other)
