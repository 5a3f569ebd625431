"""When a stage is validated, which model is best, when it ends early."""

from __future__ import annotations

import pytest

from tinyllava_fast.config.validation import BenchmarkConfig, ValidationConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.train.standing import Standing, ends_with_best, interval, judge, outcome, said


@pytest.mark.parametrize(
    ("steps", "cost", "every"),
    [(1000, 0.1, 100), (1000, 6.0, 334), (95, 0.1, 10), (100, 2.0, 0), (100, 30.0, 0), (5000, 0.0, 500), (3, 0.01, 1)],
)
def test_the_default_interval_costs_at_most_three_percent(steps: int, cost: float, every: int) -> None:
    assert interval(ValidationConfig(share=0.1), steps, cost) == every
    validations = -(-steps // every) if every else 1
    assert validations * cost <= 0.02 * steps or validations == 1
    assert interval(ValidationConfig(share=0.1, every_steps=7), steps, cost) == 7


def run(values: list[float], config: ValidationConfig) -> tuple[Standing, list[bool]]:
    standing: Standing = {}
    best = []
    for number, value in enumerate(values, 1):
        if config.metric == "loss":
            judge(standing, config, 10 * number, {"loss": value, "seconds": 0.5})
        else:
            judge(standing, config, 10 * number, {"scores": {config.metric: value}, "seconds": 0.5})
        best.append(standing["last"]["best"])
        if standing["ended_early"]:
            break
    return standing, best


def test_the_lowest_loss_is_best_and_patience_counts_from_it() -> None:
    standing, best = run([3.0, 2.0, 2.5, 1.5, 1.5, 1.6, 1.0], ValidationConfig(share=0.1, keep="best", patience=2))
    assert best == [True, True, False, True, False, False] and standing["ended_early"]
    assert standing["best"] == {"step": 40, "metric": "loss", "value": 1.5} and standing["last_step"] == 60
    config = ValidationConfig(share=0.1, keep="best", patience=2)
    assert ends_with_best(config, standing) and not ends_with_best(ValidationConfig(share=0.1), standing)
    told = outcome(config, standing)
    assert told["output"] == "best" and told["ended_early"] is True and told["seconds"] == 3.0
    assert "the best is 1.5000 of step 40" in said(standing) and "validation.patience" in said(standing)


def test_the_highest_score_is_best_and_another_metric_begins_anew() -> None:
    pope = BenchmarkConfig(name="pope", data="x")
    standing, best = run([10.0, 12.0, 11.0], ValidationConfig(benchmarks=[pope], metric="pope", keep="best"))
    assert best == [True, True, False] and standing["best"]["value"] == 12.0
    judge(standing, ValidationConfig(share=0.1), 50, {"loss": 99.0, "seconds": 0.0})
    assert standing["best"] == {"step": 50, "metric": "loss", "value": 99.0}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"records": "a.json", "share": 0.1}, "share: given beside records"),
        ({"image_folder": "images"}, "image_folder: given without records"),
        ({"keep": "best"}, "keep: best goes by a validation loss, which needs records or a share"),
        ({"patience": 3}, "patience: 3 goes by a validation loss"),
        ({"share": 0.1, "metric": "pope"}, "metric: 'pope' is neither the loss nor one of the benchmarks; known: loss"),
    ],
    ids=["two sources", "folder alone", "best of nothing", "patience for nothing", "unknown metric"],
)
def test_settings_that_contradict_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ValidationConfig(**keys).check("run.yaml: stages.s.validation")  # type: ignore[arg-type]


def test_other_records_begin_the_search_anew_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    config = ValidationConfig(share=0.1, keep="best", patience=2)
    standing: Standing = {}
    for step, loss, measured in ((10, 1.0, "a"), (20, 2.0, "a"), (30, 5.0, "b")):
        judge(standing, config, step, {"loss": loss, "seconds": 0.0}, measured)
    assert standing["best"] == {"step": 30, "metric": "loss", "value": 5.0} and standing["waited"] == 0
    assert "of step 10, was validated with something else" in caplog.text and "anew at step 30" in caplog.text
    caplog.clear()
    judge(standing, config, 40, {"loss": 6.0, "seconds": 0.0}, "b")
    del standing["measured"]  # as an older version's checkpoint
    judge(standing, config, 50, {"loss": 7.0, "seconds": 0.0}, "c")
    assert standing["best"]["step"] == 30 and standing["ended_early"] and not caplog.text
