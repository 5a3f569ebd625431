"""Standard errors against brute force, tests against their definition."""

from __future__ import annotations

import math
import random

import pytest

from tinyllava_fast.eval.statistics import (
    clustered_error,
    exact_sign_test,
    histogram,
    mean,
    mean_influence,
    ratio_influence,
)


def test_clusters_of_one_give_the_usual_error():
    values = [random.Random(i).random() for i in range(50)]
    usual = math.sqrt(sum((v - mean(values)) ** 2 for v in values)) / len(values)
    assert clustered_error(mean_influence(values), range(50)) == pytest.approx(usual)
    pairs = clustered_error(mean_influence([v for v in values for _ in range(2)]), [i // 2 for i in range(100)])
    assert pairs == pytest.approx(usual)  # each value twice in one cluster adds nothing
    assert clustered_error([0.0, 0.0], ["one", "one"]) is None and mean([]) == 0


def test_ratio_error_equals_a_jackknife_to_first_order():
    rng = random.Random(0)
    lower = [rng.randint(1, 3) for _ in range(400)]
    upper = [rng.randint(0, n) for n in lower]
    influence = ratio_influence(upper, lower)
    ratio, i = sum(upper) / sum(lower), 7
    without = (sum(upper) - upper[i]) / (sum(lower) - lower[i])
    assert ratio - without == pytest.approx(influence[i], rel=0.02) and sum(influence) == pytest.approx(0, abs=1e-12)
    assert ratio_influence([0.0], [0.0]) == [0.0]


@pytest.mark.parametrize(
    ("wins", "losses", "p"), [(0, 0, 1.0), (5, 5, 1.0), (5, 0, 2 / 32), (1, 8, 20 / 512), (3000, 2000, 0.0)]
)
def test_sign_test(wins, losses, p):
    assert exact_sign_test(wins, losses) == exact_sign_test(losses, wins) == pytest.approx(p, abs=1e-12)


def test_histogram():
    summary = histogram([0.0, 1.0, 2.0, 4.0], bins=4)
    assert summary == {"count": 4, "p50": 2.0, "p95": 4.0, "p99": 4.0, "max": 4.0, "bins": [1, 1, 1, 1]}
    assert histogram([]) == {} and sum(histogram([0.0, 0.0])["bins"]) == 2
