"""The progress line of an evaluation."""

from __future__ import annotations

import logging


def test_progress_speaks_rarely_where_nobody_watches(monkeypatch, caplog):
    from tinyllava_fast.eval.progress import progress

    monkeypatch.setattr("tinyllava_fast.eval.progress.log.propagate", True)
    now = 0.0
    monkeypatch.setattr("tinyllava_fast.eval.progress.time.monotonic", lambda: now)
    done = 0
    with caplog.at_level(logging.INFO, logger="tinyllava_fast"):
        for _ in progress(range(100), total=100, label="pictures", last=False):
            now += 1  # a second for each
            done += 1
    assert done == 100
    assert [r.message.split(",")[0] for r in caplog.records] == [
        "30/100 pictures",
        "60/100 pictures",
        "90/100 pictures",
    ]
