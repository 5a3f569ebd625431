"""The report shows the run's own numbers and needs nothing but itself."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from tinyllava_fast.errors import UserError
from tinyllava_fast.eval import runner
from tinyllava_fast.eval.report import write_report, write_scores
from tinyllava_fast.eval.report.confusion import MOST, OTHER, confusions, section
from tinyllava_fast.eval.report.data import Curve, gather, read_curves
from tinyllava_fast.eval.report.html import duration, page, size
from tinyllava_fast.eval.report.scores import model_name
from tinyllava_fast.eval.report.svg import Line, line_chart, loss_chart

SEEN = "seen/easy_vqa"


@pytest.fixture(scope="module")
def run_dir(folder, data_dir, tmp_path_factory):
    """A run folder with metrics, summary, config and both evaluations."""
    root = tmp_path_factory.mktemp("my<run>")
    entries = [
        {"stage": stage, "step": base + i, "loss": 5.0 / (base + i)}
        for base, stage in ((1, "pretrain"), (11, "finetune"))
        for i in range(10)
    ]
    (root / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    summary = {
        "train_seconds": 125.0,
        "samples_per_s": 51.5,
        "tokens_per_s": 7000.0,
        "steps": 20,
        "peak_rss_bytes": 2**30,
    }
    (root / "summary.json").write_text(json.dumps(summary))
    (root / "config.yaml").write_text("seed: 0  # <tag>\n")
    for name, blind in (("seen", False), ("blind", True)):
        runner.evaluate(folder, ["easy_vqa"], data_dir, root / name, blind=blind, device="cpu", batch_tokens=2048)
    return root


def test_report_files(run_dir):
    html_path, png_path = write_report(run_dir, run_dir / SEEN, run_dir / "blind" / "easy_vqa")
    html = html_path.read_text()
    assert html.count("data:image/png;base64,") >= 4  # one per test image, and the mistakes
    assert not re.search(r'(src|href)="(?!data:)', html) and "http" not in html and "<script" not in html
    assert "my&lt;run&gt;" in html and "&lt;tag&gt;" in html and "<tag>" not in html
    for text in ("pretrain", "finetune", "2 min 05 s", "1.00 GiB", "blank", "yes/no shape", "of 20 questions right"):
        assert text in html, text
    assert png_path.read_bytes().startswith(b"\x89PNG") and png_path.stat().st_size > 20_000


def test_report_without_training_or_blind(run_dir, tmp_path):
    data = gather(tmp_path, run_dir / SEEN, None)
    html = page(data)
    assert "No training metrics" in html and "blank" not in html and "Configuration" not in html
    right = [replace(s, right=True) for s in data.shots]
    assert "truth:" not in page(replace(data, shots=right, mistakes=[]))


def test_report_draws_reproducibly_and_one_question_an_image(run_dir):
    one, two = (gather(run_dir, run_dir / SEEN, None, shots=3) for _ in range(2))
    assert one.shots == two.shots and len({s.image for s in one.shots}) == 3
    wrong = {s.key for s in one.mistakes}
    assert len(wrong) <= one.seen.wrong and not wrong & {s.key for s in one.shots}
    assert not any(s.right for s in one.mistakes)


def test_report_needs_results(tmp_path):
    with pytest.raises(UserError, match="run tlf-eval first"):
        gather(tmp_path, tmp_path, None)


def test_scores_page(run_dir):
    for v in (rows := [json.loads(x) for x in (run_dir / SEEN / "verdicts.jsonl").read_text().splitlines()]):
        v["credit"] = {"test-0": 1.0, "test-1": 0.3, "test-2": None}.get(v["key"], 0.0)
    (run_dir / SEEN / "verdicts.jsonl").write_text("".join(json.dumps(v) + "\n" for v in rows))
    html = write_scores(run_dir / "seen", ["easy_vqa"]).read_text()
    assert not re.search(r'(src|href)="(?!data:)', html) and "http" not in html and "<script" not in html
    assert html.index("By type") < html.index("Samples") < html.index("Answer times")
    for text in ("By type", "yes/no shape", "Answer times", "p95", "right 1", "partly 1", "unscored 1", "wrong 17"):
        assert text in html, text
    assert html.count("data:image/jpeg;base64,") == 20


def test_curves(tmp_path, run_dir):
    assert read_curves(tmp_path / "none.jsonl") == []
    curves = read_curves(run_dir / "metrics.jsonl")
    assert [(c.stage, c.steps[0], c.steps[-1]) for c in curves] == [("pretrain", 1, 10), ("finetune", 11, 20)]
    flat = Curve("s", [1, 2, 3], [2.0, 2.0, 2.0])
    assert flat.smooth == pytest.approx([2.0, 2.0, 2.0])
    chart = loss_chart([flat, Curve("t", [4], [1e-4])])
    assert chart.count("<polyline") == 4 and "nan" not in chart
    assert chart.count('class="stage"') == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(47.6, "48 s"), (59.7, "1 min 00 s"), (723, "12 min 03 s"), (7500, "2 h 05 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_size():
    assert size(3 * 2**20) == "3 MiB" and size(1.5 * 2**30) == "1.50 GiB"


def _verdict(category: str, truth: str, answer: str | None) -> dict:
    return {"category": category, "truth": truth, "answer": answer}


def test_confusions_count_what_was_said_for_what():
    rows = [
        *[_verdict("digit", "One", "one.")] * 3,
        _verdict("digit", "one", "Two"),
        *[_verdict("digit", "two", "two")] * 2,
        _verdict("digit", "two", "three"),
        _verdict("digit", "two", None),
        *[_verdict("open", str(n), "x") for n in range(30)],
        *[_verdict("always", "yes", "no")] * 9,
        _verdict("hidden", "", "a"),
    ]
    (table,) = confusions(rows)
    assert (table.category, table.answers) == ("digit", ["one", "two"])
    assert (table.row("one"), table.row("two")) == ([3, 1, 0], [0, 2, 2])
    html = section(rows)
    assert html.count("<table") == 1 and "75 %" in html and "50 %" in html and OTHER in html
    assert section([_verdict("", "a", "b")]) == ""


@pytest.mark.parametrize(("answers", "tables"), [(MOST, 1), (MOST + 1, 0)])
def test_confusions_of_large_sets_are_left_out(answers, tables):
    assert len(confusions([_verdict("", f"w{n}", "w0") for n in range(answers)] * 3)) == tables


def test_categories_of_one_answer_each_make_one_table():
    rows = [_verdict(name, name, said) for name in ("cat", "dog") for said in ("cat", "cat", "dog")]
    (table,) = confusions(rows)
    assert (table.category, table.answers) == ("", ["cat", "dog"])
    assert [table.row(truth) for truth in table.answers] == [[2, 1, 0], [2, 1, 0]]


@pytest.mark.parametrize(
    ("path", "name"),
    [("/runs/digits/final", "digits"), ("/runs/digits/pretrain", "digits/pretrain"), ("answers", "answers")],
)
def test_a_model_is_called_by_its_run(path, name):
    assert model_name(path) == name


@pytest.mark.parametrize("highest", [1.3, 2.5, 40.0])
def test_a_logarithmic_scale_of_less_than_a_decade_has_ticks_too(highest):
    drawn = line_chart([Line([1, 2, 3], [1.27, highest, 1.9], 0, "line", "")], "loss", log=True)
    assert drawn.count('text-anchor="end"') >= 3
