"""What `tlf-bench serve` makes of its samples of the server's memory."""

from __future__ import annotations

import pytest

from tinyllava_fast.bench.serve import memory_growth


def test_growth_is_that_of_windows_under_load_and_no_single_pass_makes_it():
    samples = [(at / 2, 1000) for at in range(20)]  # before it has settled: anything
    samples += [(10 + at / 2, 1000 + 80 * (at == 0)) for at in range(20)]
    samples += [(20 + at / 2, 5000) for at in range(60)]
    samples += [(50 + at / 2, 1100 + 90 * (at == 19)) for at in range(20)]
    samples += [(60.0, 10), (61.0, 10)]  # nobody asks any more
    found = memory_growth(samples, 60)
    assert (found["rss_before"], found["rss_after"]) == (1000, 1100)
    assert found["rss_growth"] == found["rss_growth_least"] == pytest.approx(0.1)
    assert found["rss_growth_most"] == pytest.approx(1190 / 1080 - 1)


def test_a_short_load_has_short_windows_and_one_sample_is_enough():
    assert memory_growth([(0.0, 9), (0.5, 100), (1.5, 110), (2.1, 7)], 2)["rss_growth"] == pytest.approx(0.1)
    assert memory_growth([(0.1, 100)], 2)["rss_growth"] == 0
