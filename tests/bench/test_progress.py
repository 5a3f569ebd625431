"""The lines come between items, on the logger alone, and now and then."""

from __future__ import annotations

import re

import pytest

from tinyllava_fast.bench.progress import progress
from tinyllava_fast.log import setup_logging


def test_every_item_is_yielded_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    assert list(progress([3, 1, 2], "turns", every=0)) == [3, 1, 2]
    found = capsys.readouterr()
    assert found.out == ""
    assert "turns: 3 to do" in found.err
    assert re.findall(r"turns: (\d)/3, [\d.]+ a minute, [\d.]+ s left", found.err) == ["1", "2", "3"]


def test_nothing_is_said_while_an_item_is_worked_on(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    counts = [capsys.readouterr().err.count("/2") for _ in progress([0, 1], "turns", every=0)]
    assert counts == [0, 1]  # the line about an item comes when it is done


def test_short_ones_say_only_that_they_begin(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    list(progress(range(5), "seeds"))
    assert capsys.readouterr().err.count("seeds") == 1
