import json
import sys
import time

import pytest
import torch

from tests.train.test_resume import back_to, run_cli
from tinyllava_fast.hardware import peak_rss_bytes
from tinyllava_fast.train import progress
from tinyllava_fast.train.metrics import MetricsWriter, Window, memory_bytes, truncate_after


def entry(step):
    return {"step": step, "stage": "s", "loss": 1.5, "lr": {"llm": 0.1}, "grad_norm": 2.0}


def test_lines_events_and_truncation(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(entry(step))
    writer.sync()
    writer.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    writer = MetricsWriter(tmp_path, after_step=2)
    writer.write(entry(3))
    writer.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard" / "s")).Reload()
    assert {"train/loss", "train/grad_norm", "lr/llm"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3]


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3}', "garbage\n", "[1]\n"])
def test_a_line_cut_short_is_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
    truncate_after(path, 9)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_without_tensorboard_the_lines_remain(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    writer = MetricsWriter(tmp_path)
    writer.write(entry(1))
    writer.close()
    assert not (tmp_path / "tensorboard").exists()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1


def test_window_rates():
    window = Window(started=time.perf_counter() - 2.0)
    for _ in range(2):
        window.add({"samples": 4, "tokens": 150, "supervised_tokens": 10, "capacity": 200}, wait_s=0.25, own_s=0.5)
    rates = window.rates()
    assert rates["samples_per_s"] == pytest.approx(4, rel=0.05)
    assert rates["tokens_per_s"] == pytest.approx(150, rel=0.05)
    assert rates["supervised_tokens_per_s"] == pytest.approx(10, rel=0.05)
    assert rates["padding_share"] == pytest.approx(0.25)
    assert rates["data_wait_share"] == pytest.approx(0.25, rel=0.05)
    assert rates["step_s"] == pytest.approx(1, rel=0.05)


def test_memory_is_in_bytes():
    # The kernel counts the two apart, so they may differ by a few pages.
    assert 10**7 < memory_bytes(torch.device("cpu")) < 1.01 * peak_rss_bytes() < 10**12


SHOWN = {
    "loss": 1.25,
    "samples_per_s": 3.0,
    "tokens_per_s": 300.0,
    "supervised_tokens_per_s": 30.0,
    "memory_bytes": 2_500_000_000,
}


def test_plain_lines_off_a_terminal(caplog):
    bar = progress.Progress("finetune", 10, done=4)
    with caplog.at_level("INFO", logger="tinyllava_fast"):
        bar.update(5, SHOWN, line=True)
        bar.update(6, SHOWN, line=False)
    bar.close()
    (record,) = caplog.records
    for part in (
        "finetune 5/10",
        "loss 1.2500",
        "3.0 samples/s",
        "300 tok/s",
        "30 supervised tok/s",
        "2.50 GB",
        "ETA 0:0",
    ):
        assert part in record.getMessage()


def test_live_line_on_a_terminal(monkeypatch):
    class Terminal:
        def __init__(self):
            self.text = ""

        def isatty(self):
            return True

        def write(self, text):
            self.text += text
            return len(text)

        def flush(self):
            pass

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    bar = progress.Progress("finetune", 10)
    bar.update(6, SHOWN, line=False)
    bar.advance(7)
    bar.close()
    assert "7/10" in terminal.text and "supervised tok/s" in terminal.text and "ETA" in terminal.text


def test_silent_on_other_ranks(caplog):
    bar = progress.Progress("finetune", 10, show=False)
    bar.update(5, SHOWN, line=True)
    bar.close()
    assert not caplog.records


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (65.9, "1:05"), (3725, "1:02:05"), (-3, "0:00")])
def test_format_seconds(seconds, text):
    assert progress.format_seconds(seconds) == text


def test_lines_over_several_steps_hold_their_mean_also_when_resumed(tiny_run, losses):
    path = tiny_run()
    run, whole, fine = (path.parent / name for name in ("run", "whole", "fine"))
    assert run_cli(path, f"output_dir={fine}") == 0
    assert run_cli(path, f"output_dir={whole}", "log_every=3") == 0
    steps = [loss for *_, loss in losses(fine)]
    lines = losses(whole)
    assert [s for s, *_ in lines] == [3, 4, 6, 9, 12]
    for (_, _, mean), (a, b) in zip(lines, [(0, 3), (3, 4), (4, 6), (6, 9), (9, 12)], strict=True):
        assert mean == pytest.approx(sum(steps[a:b]) / (b - a), rel=1e-12)
    assert run_cli(path, "log_every=3") == 0
    back_to(run, "finetune-00000007")
    assert run_cli(path, "log_every=3") == 0
    assert losses(run) == lines
    summary = json.loads((run / "summary.json").read_text())
    assert summary["loss"] == {"pretrain": lines[1][2], "finetune": lines[-1][2]} and summary["changes"] == []
    assert sorted(p.name for p in (run / "tensorboard").iterdir()) == ["finetune", "pretrain"]
