from __future__ import annotations

import numpy as np
import pytest

from tinyllava_fast.config.sources import SourceConfig
from tinyllava_fast.data.mixing import epoch_order, samples_per_epoch


def amounts(**given):
    return SourceConfig(path="x", **given)


@pytest.mark.parametrize(
    ("sizes", "given", "expected"),
    [
        ([10], [{}], [10]),
        ([10, 4], [{}, {}], [10, 4]),
        ([10, 4], [{"times": 2}, {"samples": 3}], [20, 3]),
        ([10, 4], [{"times": 0.01}, {"times": 0.5}], [1, 2]),
        ([100, 10, 10], [{"weight": w} for w in (3, 2, 1)], [60, 40, 20]),
        ([3, 3, 4], [{"weight": 1}] * 3, [4, 3, 3]),
        ([5, 5], [{"weight": 1e-9}, {"weight": 1}], [1, 10]),
    ],
)
def test_samples_per_epoch(sizes, given, expected):
    assert samples_per_epoch(sizes, [amounts(**one) for one in given]) == expected


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_one_source_has_the_order_that_it_has_alone(seed):
    for epoch in range(3):
        assert np.array_equal(
            epoch_order([50], [50], seed, epoch), np.random.default_rng([seed, epoch]).permutation(50)
        )
    mixed = epoch_order([50, 20], [50, 20], seed, 1)
    assert np.array_equal(mixed[mixed < 50], epoch_order([50], [50], seed, 1))


def test_every_prefix_has_the_proportions():
    order = epoch_order([100, 1000, 31], [600, 400, 200], 3, 2) % 1131
    owners = np.searchsorted([100, 1100], order, side="right")
    for end in range(1, len(order) + 1):
        found = np.bincount(owners[:end], minlength=3)
        assert np.abs(found - end * np.array([600, 400, 200]) / 1200).max() <= 3


def test_a_source_goes_on_where_the_last_epoch_ended():
    orders = [epoch_order([10], [4], 0, epoch) for epoch in range(5)]
    shown = np.concatenate(orders) % 10
    assert sorted(shown[:10]) == sorted(shown[10:]) == list(range(10))
    assert not np.array_equal(shown[:10], shown[10:])


def test_tickets_tell_the_showings_of_a_sample_apart():
    order = epoch_order([3, 5], [8, 5], 1, 0)
    assert len(set(order.tolist())) == 13
    assert np.bincount(order % 8).tolist()[3:] == [1] * 5
    assert sorted(order[order % 8 < 3] // 8) == [0, 0, 0, 1, 1, 1, 2, 2]
