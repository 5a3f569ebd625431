import math

import pytest

from tinyllava_fast.train.lr_schedule import lr_factor, warmup_steps


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd", "inverse_sqrt"])
def test_warm_up_rises_linearly_and_never_starts_at_zero(schedule):
    factors = [lr_factor(i, total_steps=100, schedule=schedule, warmup_ratio=0.04) for i in range(4)]
    assert factors == [0.25, 0.5, 0.75, 1.0]


def test_decay_follows_its_formula():
    settings = {"total_steps": 110, "warmup_ratio": 10 / 110, "min_lr_ratio": 0.1}
    assert lr_factor(10, schedule="cosine", **settings) == 1.0
    assert lr_factor(60, schedule="cosine", **settings) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert lr_factor(60, schedule="linear", **settings) == pytest.approx(0.1 + 0.9 * 0.5)
    assert lr_factor(109, schedule="constant", **settings) == 1.0
    assert lr_factor(500, schedule="linear", **settings) == pytest.approx(0.1)  # past the end it stays at the floor


def test_wsd_stays_at_its_peak_and_falls_at_the_end():
    factors = [
        lr_factor(i, total_steps=100, schedule="wsd", warmup_ratio=0.1, decay_ratio=0.2, min_lr_ratio=0.5)
        for i in range(101)
    ]
    assert factors[9:81] == [1.0] * 72 and factors[90] == pytest.approx(0.75) and factors[100] == 0.5
    assert lr_factor(5, total_steps=10, schedule="wsd", decay_ratio=1.0) == pytest.approx(0.5)
    assert lr_factor(9, total_steps=10, schedule="wsd", decay_ratio=0.0) == 1.0


def test_inverse_sqrt_does_not_know_the_end():
    settings = {"schedule": "inverse_sqrt", "warmup_ratio": 0.1}
    assert lr_factor(10, total_steps=100, **settings) == 1.0
    assert lr_factor(40, total_steps=100, **settings) == 0.5
    assert lr_factor(40, total_steps=100, **settings) == lr_factor(40, total_steps=99, **settings)
    assert lr_factor(999, total_steps=1000, min_lr_ratio=0.1, **settings) > 0.1


def test_decay_is_monotonic_after_warm_up():
    for schedule in ("cosine", "linear", "wsd", "inverse_sqrt"):
        factors = [lr_factor(i, total_steps=50, schedule=schedule, warmup_ratio=0.1) for i in range(50)]
        assert factors[4:] == sorted(factors[4:], reverse=True)
        assert factors[-1] > 0


@pytest.mark.parametrize(("total", "ratio", "steps"), [(1, 0.5, 0), (10, 0.03, 1), (10, 0.0, 0), (3, 1.0, 2)])
def test_warm_up_never_takes_the_whole_stage(total, ratio, steps):
    assert warmup_steps(total, ratio) == steps


def test_unknown_schedule_names_the_known_ones():
    with pytest.raises(ValueError, match="'cosin'; known: cosine, linear, constant, wsd, inverse_sqrt"):
        lr_factor(5, total_steps=10, schedule="cosin")
