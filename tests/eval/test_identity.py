"""To what an answer belongs: what has changed is asked again, what has not is not, and nothing given is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.eval.changes import CHANGES, another_picture, touched
from tests.eval.layouts import write_jsonl
from tests.eval.own import BLUE, RED, ROWS, answers, finishes, picture, write_data
from tinyllava_fast.errors import UserError
from tinyllava_fast.eval import pictures
from tinyllava_fast.eval.answers import line_of
from tinyllava_fast.eval.pictures import CLOSED, MISSING, Pictures
from tinyllava_fast.eval.results import read_verdicts
from tinyllava_fast.infer.assistant import Assistant


@pytest.mark.parametrize(
    ("change", "expected", "settled"),
    [pytest.param(*case, True, id=case[0].__name__) for case in CHANGES]
    + [pytest.param(*case, False, id=f"{case[0].__name__}, new files") for case in CHANGES[:5]],
)
def test_what_has_changed_is_asked_again_and_nothing_else(
    evaluate, finished, tmp_path, monkeypatch, change, expected, settled
):
    """The second run answers as a run from the start would, whether digests are kept or computed anew."""
    monkeypatch.setattr(pictures, "SETTLED_S", -1e6 if settled else 1e6)
    shutil.copytree(finished, tmp_path / "run")
    data, out = tmp_path / "run" / "data", tmp_path / "run" / "out"
    evaluate(data, out)  # the copy's digests
    (out / "custom/run.json").unlink()  # else the first run's stays where nothing is asked
    change(data, out / "custom/answers.jsonl")
    found = evaluate(data, out)
    assert found["run"]["answered_now"] == expected
    fresh = evaluate(data, tmp_path / "fresh")
    for key in ("run", "config_hash"):
        assert bool(found.pop(key)) and bool(fresh.pop(key))
    assert found == fresh and answers(out) == answers(tmp_path / "fresh")


def test_a_copied_folder_keeps_its_answers(evaluate, finished, tmp_path):
    shutil.copytree(finished / "out", tmp_path / "out")
    shutil.copytree(finished / "data", tmp_path / "moved")
    before = (tmp_path / "out/custom/answers.jsonl").read_bytes()
    evaluate(tmp_path / "moved", tmp_path / "out")
    assert (tmp_path / "out/custom/answers.jsonl").read_bytes() == before


def test_pictures_that_are_as_they_were_are_not_read_again(evaluate, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "SETTLED_S", -1e6)
    shutil.copytree(finished, tmp_path / "run")
    data, out = tmp_path / "run" / "data", tmp_path / "run" / "out"
    evaluate(data, out)
    read: list[Path] = []
    digest = pictures._digest
    monkeypatch.setattr(pictures, "_digest", lambda path: (read.append(path), digest(path))[1])
    evaluate(data, out)
    assert read == []
    touched(data, out)
    evaluate(data, out)
    assert read == [data / "a.bmp"]


def test_a_file_just_written_is_not_trusted_later(tmp_path):
    """Its next change may come within one tick of the clock."""
    picture(tmp_path / "a.bmp", RED)
    first = Pictures(tmp_path)
    first.look([tmp_path / "a.bmp", tmp_path / "none.bmp"])
    assert first.digest(tmp_path / "none.bmp") == MISSING and len(first.digest(tmp_path / "a.bmp")) == 32
    assert (tmp_path / "pictures.jsonl").read_text() == ""
    assert pictures.stamp_of(tmp_path / ("x" * 300)) is None and pictures.stamp_of(Path("a\0b")) is None
    first.look([tmp_path])  # a folder
    assert first.digest(tmp_path) == CLOSED


def test_options_and_data_folders_do_not_mix(evaluate, folder, tmp_path):
    """The same names below two folders, into one output, by option and by --data; then back again for nothing."""
    rows = [{"id": 1, "image": "a.png", "question": "what colour is it?", "answer": "red"}]
    for name, colour in (("clean", RED), ("noisy", BLUE)):
        picture(tmp_path / name / "a.png", colour)
        write_jsonl(tmp_path / name / "questions.jsonl", rows)
    write_jsonl(tmp_path / "questions.jsonl", rows)
    seen = []
    for name in ("clean", "noisy", "clean"):
        found = evaluate(tmp_path, tmp_path / "o1", f"custom.images={name}")
        seen.append((found["run"]["answered_now"], answers(tmp_path / "o1")))
    assert [count for count, _ in seen] == [1, 1, 1] and seen[0] == seen[2] != seen[1]
    assert (tmp_path / "o1/custom/answers.jsonl").read_text().count('"key"') == 2  # the third run found its answer
    for name, (_, expected) in zip(("clean", "noisy"), seen, strict=False):
        evaluate(tmp_path / name, tmp_path / "o2")
        assert answers(tmp_path / "o2") == expected


def test_twins_of_other_names_are_asked_once(evaluate, tmp_path, assistant):
    for name in ("x/1.bmp", "y/2.bmp", "z.bmp"):
        picture(tmp_path / name, RED if name != "z.bmp" else BLUE)
    rows = [{"id": i, "image": i, "question": "what?", "answer": "x"} for i in ("x/1.bmp", "y/2.bmp", "z.bmp")]
    pairs = [["x/1.bmp", "z.bmp"], ["z.bmp", "x/1.bmp"], ["y/2.bmp", "z.bmp"]]
    rows += [{"id": str(n), "image": pair, "question": "what?", "answer": "x"} for n, pair in enumerate(pairs)]
    write_jsonl(tmp_path / "questions.jsonl", rows)
    before = assistant.engine.counters.requests
    found = evaluate(tmp_path, tmp_path / "o")
    assert assistant.engine.counters.requests - before == 4 and found["counts"]["answered"] == 6
    said = answers(tmp_path / "o")
    assert said["x/1.bmp"] == said["y/2.bmp"] and said["0"] == said["2"]


def test_blind_answers_do_not_depend_on_pictures(evaluate, finished, tmp_path):
    shutil.copytree(finished / "data", tmp_path / "data")
    evaluate(tmp_path / "data", tmp_path / "out", blind=True)
    before = (tmp_path / "out/custom/answers.jsonl").read_bytes()
    another_picture(tmp_path / "data", tmp_path)
    evaluate(tmp_path / "data", tmp_path / "out", blind=True)
    assert (tmp_path / "out/custom/answers.jsonl").read_bytes() == before
    assert {v["pictures"] for v in read_verdicts(tmp_path / "out/custom")} == {None}


def test_other_truths_are_scored_anew(evaluate, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    said = answers(tmp_path / "run/out")
    rows = [{**row, "answer": said[row["id"]] or "x"} for row in ROWS]  # the tiny model may say nothing
    write_jsonl(tmp_path / "run/data/questions.jsonl", rows)
    before = (tmp_path / "run/out/custom/answers.jsonl").read_bytes()
    found = evaluate(tmp_path / "run/data", tmp_path / "run/out", "custom.metric=exact")
    earned = 100 * sum(bool(text) for text in said.values()) / 3
    assert found["metrics"][0]["value"] == pytest.approx(earned) and earned > 0
    assert (tmp_path / "run/out/custom/answers.jsonl").read_bytes() == before


@pytest.fixture
def meddle(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], None]:
    """Does something between the engine's answers."""
    run = assistant.engine.run

    def install(act: Callable[[int], None]) -> None:
        count = iter(range(1000))

        def between(*arguments: Any, **options: Any) -> Iterator[Any]:
            for answer in run(*arguments, **options):
                act(next(count))
                yield answer

        monkeypatch.setattr(assistant.engine, "run", between)

    return install


def test_a_picture_replaced_during_the_run_is_asked_about_again(evaluate, tmp_path, meddle):
    write_data(tmp_path / "data")
    picture(tmp_path / "later.bmp", (9, 200, 9))
    meddle(lambda n: shutil.copy(tmp_path / "later.bmp", tmp_path / "data/a.bmp") if n == 0 else None)
    evaluate(tmp_path / "data", tmp_path / "out")
    meddle(lambda n: None)
    evaluate(tmp_path / "data", tmp_path / "fresh")
    assert answers(tmp_path / "out") == answers(tmp_path / "fresh")
    digests = [v["pictures"] for v in read_verdicts(tmp_path / "out/custom")]
    assert digests == [v["pictures"] for v in read_verdicts(tmp_path / "fresh/custom")]


def test_a_picture_that_never_rests_is_named(evaluate, tmp_path, meddle):
    write_data(tmp_path / "data")
    meddle(lambda n: picture(tmp_path / "data/a.bmp", (n, n, n)))
    with pytest.raises(UserError, match=r"pictures of 2 questions change .* the first is .*a\.bmp"):
        evaluate(tmp_path / "data", tmp_path / "out")
    assert (tmp_path / "out/custom/answers.jsonl").read_text().count('"key"') == 1  # b's is kept


@pytest.mark.parametrize(
    "first", [b"", b"half", b"<!DOCTYPE html><p>404</p>", None], ids=["empty", "cut", "page", "missing"]
)
@pytest.mark.parametrize("blind", [False, True])
def test_a_mended_picture_is_asked_about(evaluate, tmp_path, first, blind):
    data, out = tmp_path / "data", tmp_path / "out"
    write_data(data)
    whole = (data / "b.bmp").read_bytes()
    (data / "b.bmp").unlink()
    if first is not None:
        (data / "b.bmp").write_bytes(whole[:60] if first == b"half" else first)
    if not (blind and first is not None):  # a blind run does not look at files that are there
        found = evaluate(data, out, missing_images="empty", blind=blind)
        assert found["counts"]["unreadable"] == 2 and found["unreadable_images"]
        assert finishes(out)["two"] == finishes(out)["both"] == "unreadable image" and answers(out)["two"] == ""
        before = (out / "custom/answers.jsonl").read_bytes()
        evaluate(data, out, missing_images="empty", blind=blind)
        assert (out / "custom/answers.jsonl").read_bytes() == before  # still damaged: not asked again
    (data / "b.bmp").write_bytes(whole)
    found = evaluate(data, out, blind=blind)
    assert set(finishes(out).values()) <= {"eos", "length"} and found["counts"]["unreadable"] == 0
    evaluate(data, tmp_path / "fresh", blind=blind)
    assert answers(out) == answers(tmp_path / "fresh")


def test_what_can_be_read_now_is_open_although_the_file_is_the_same(evaluate, finished, tmp_path):
    """As after a decoder was installed, or permissions were granted."""
    shutil.copytree(finished, tmp_path / "run")
    log = tmp_path / "run/out/custom/answers.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    bad = {"finish": "unreadable image", "answer": ""}
    log.write_text("".join(line_of(r | (bad if r.get("key") == "two" else {})) for r in records))
    evaluate(tmp_path / "run/data", tmp_path / "run/out")
    assert answers(tmp_path / "run/out") == answers(finished / "out")
