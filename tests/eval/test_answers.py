"""To what an answer belongs: what has changed is asked again, what has not is not, and nothing given is lost."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.eval.layouts import write_jsonl
from tests.infer.tiny import make_model, tiny_config
from tinyllava_fast.errors import CheckpointError, DataError, UserError
from tinyllava_fast.eval import cli, pictures, runner
from tinyllava_fast.eval.answers import AnswerLog, asked, line_of
from tinyllava_fast.eval.benchmarks import custom
from tinyllava_fast.eval.benchmarks.base import Question
from tinyllava_fast.eval.machine import model_digest, plugins_digest
from tinyllava_fast.eval.pictures import CLOSED, MISSING, Pictures
from tinyllava_fast.eval.results import read_verdicts
from tinyllava_fast.infer.assistant import Assistant
from tinyllava_fast.infer.types import Request
from tinyllava_fast.models.build import build_image_processor
from tinyllava_fast.models.io import save_model

ROWS = [
    {"id": "one", "image": "a.bmp", "question": "what is it?", "answer": "x"},
    {"id": "two", "image": "b.bmp", "question": "what is it?", "answer": "x"},
    {"id": "both", "image": ["a.bmp", "b.bmp"], "question": "which is larger?", "answer": "x"},
]
RED, BLUE = (220, 40, 40), (40, 60, 220)


def picture(path: Path, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path)


def write_data(data: Path) -> None:
    picture(data / "a.bmp", RED)
    picture(data / "b.bmp", BLUE)
    write_jsonl(data / "questions.jsonl", ROWS)


@pytest.fixture(scope="module")
def assistant(folder: Path) -> Assistant:
    return Assistant.from_pretrained(folder, device="cpu", batch_tokens=4096)


@pytest.fixture
def evaluate(folder: Path, assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Evaluates questions of one's own; the model is loaded once for all tests."""
    monkeypatch.setattr(runner.Assistant, "from_pretrained", lambda *_, **__: assistant)

    def run(data: Path, out: Path, *options: str, **others: Any) -> dict[str, Any]:
        every = ["custom.max_new_tokens=4", *options]
        return runner.evaluate(folder, ["custom"], data, out, options=every, **others)["custom"]

    return run


def finishes(out: Path) -> dict[str, str]:
    return {v["key"]: v["finish"] for v in read_verdicts(out / "custom")}


def answers(out: Path) -> dict[str, str]:
    return {v["key"]: v["answer"] for v in read_verdicts(out / "custom")}


# What happens between two runs -> how many of the three questions the second one asks.


def nothing(data: Path, log: Path) -> None:
    pass


def another_picture(data: Path, log: Path) -> None:
    picture(data / "a.bmp", BLUE)


def other_bytes_of_the_same_size_and_time(data: Path, log: Path) -> None:
    before = (data / "a.bmp").stat()
    picture(data / "a.bmp", (1, 2, 3))
    os.utime(data / "a.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    after = (data / "a.bmp").stat()
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)


def one_bit(data: Path, log: Path) -> None:
    content = bytearray((data / "a.bmp").read_bytes())
    content[-1] ^= 1
    (data / "a.bmp").write_bytes(content)


def names_swapped(data: Path, log: Path) -> None:
    (data / "a.bmp").rename(data / "c.bmp")
    (data / "b.bmp").rename(data / "a.bmp")
    (data / "c.bmp").rename(data / "b.bmp")


def order_swapped(data: Path, log: Path) -> None:
    write_jsonl(data / "questions.jsonl", [*ROWS[:2], {**ROWS[2], "image": ["b.bmp", "a.bmp"]}])


def one_picture_twice(data: Path, log: Path) -> None:
    write_jsonl(data / "questions.jsonl", [*ROWS[:2], {**ROWS[2], "image": ["a.bmp", "a.bmp"]}])


def a_picture_more(data: Path, log: Path) -> None:
    write_jsonl(data / "questions.jsonl", [*ROWS[:2], {**ROWS[2], "image": ["a.bmp", "b.bmp", "b.bmp"]}])


def no_picture(data: Path, log: Path) -> None:
    write_jsonl(data / "questions.jsonl", [{k: v for k, v in ROWS[0].items() if k != "image"}, *ROWS[1:]])


def a_link_to_the_same(data: Path, log: Path) -> None:
    (data / "a.bmp").rename(data / "elsewhere")
    (data / "a.bmp").symlink_to(data / "elsewhere")


def a_link_to_another(data: Path, log: Path) -> None:
    (data / "a.bmp").unlink()
    (data / "a.bmp").symlink_to(data / "b.bmp")


def touched(data: Path, log: Path) -> None:
    os.utime(data / "a.bmp", (1, 1))


def renamed(data: Path, log: Path) -> None:
    (data / "a.bmp").rename(data / "überall 图.bmp")
    rows = json.loads(json.dumps(ROWS).replace("a.bmp", "überall 图.bmp"))
    write_jsonl(data / "questions.jsonl", rows)


def another_prompt(data: Path, log: Path) -> None:
    write_jsonl(data / "questions.jsonl", [{**ROWS[0], "question": "what is it? "}, *ROWS[1:]])


def other_truths(data: Path, log: Path) -> None:
    write_jsonl(data / "questions.jsonl", [{**row, "answer": "y", "category": "z"} for row in ROWS])


def another_order_of_lines(data: Path, log: Path) -> None:
    write_jsonl(data / "questions.jsonl", ROWS[::-1])


def a_question_more(data: Path, log: Path) -> None:
    write_jsonl(data / "questions.jsonl", [*ROWS, {**ROWS[0], "id": "new", "question": "why?"}])


def keys_exchanged(data: Path, log: Path) -> None:
    write_jsonl(data / "questions.jsonl", [{**ROWS[0], "id": "two"}, {**ROWS[1], "id": "one"}, ROWS[2]])


def lines_twice(data: Path, log: Path) -> None:
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines, *lines[2:], *lines]))


def half_a_line(data: Path, log: Path) -> None:
    log.write_bytes(log.read_bytes()[:-9])


def only_half_a_line(data: Path, log: Path) -> None:
    log.write_bytes(log.read_bytes()[:9])


def only_the_head(data: Path, log: Path) -> None:
    log.write_text(log.read_text().splitlines(keepends=True)[0])


def empty(data: Path, log: Path) -> None:
    log.write_text("")


def removed(data: Path, log: Path) -> None:
    log.unlink()


def of_another_rank(data: Path, log: Path) -> None:
    log.rename(log.with_name("answers.3.jsonl"))


def a_backup_beside_it(data: Path, log: Path) -> None:
    log.with_name("answers.old.jsonl").write_text("nonsense\n")
    log.with_name("answers copy.jsonl").write_text("nonsense\n")


def of_another_model(data: Path, log: Path) -> None:
    log.write_text(log.read_text().replace('"model_digest": "', '"model_digest": "f'))


def another_run_in_front(data: Path, log: Path) -> None:
    text = log.read_text()
    log.write_text(
        text.replace('"model_digest": "', '"model_digest": "f').replace('"answer": "', '"answer": "f') + text
    )


def another_run_behind(data: Path, log: Path) -> None:
    text = log.read_text()
    log.write_text(
        text + text.replace('"model_digest": "', '"model_digest": "f').replace('"answer": "', '"answer": "f')
    )


def of_an_older_version(data: Path, log: Path) -> None:
    """Its digests were of names, twelve digits long."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(line_of(r | ({"asked": "0123456789ab"} if "asked" in r else {})) for r in records))


def damaged_digests(data: Path, log: Path) -> None:
    log.with_name("pictures.jsonl").write_bytes(b'[1, 2]\n{"a": 1}\nnull\n\xff\xfe\n["a", "b"')


CHANGES: list[tuple[Callable[[Path, Path], None], int]] = [
    (nothing, 0),
    (another_picture, 2),
    (other_bytes_of_the_same_size_and_time, 2),
    (one_bit, 2),
    (names_swapped, 3),
    (order_swapped, 1),
    (one_picture_twice, 1),
    (a_picture_more, 1),
    (no_picture, 1),
    (a_link_to_the_same, 0),
    (a_link_to_another, 2),
    (touched, 0),
    (renamed, 0),
    (another_prompt, 1),
    (other_truths, 0),
    (another_order_of_lines, 0),
    (a_question_more, 1),
    (keys_exchanged, 2),
    (lines_twice, 0),
    (half_a_line, 1),
    (only_half_a_line, 3),
    (only_the_head, 3),
    (empty, 3),
    (removed, 3),
    (of_another_rank, 0),
    (a_backup_beside_it, 0),
    (of_another_model, 3),
    (another_run_in_front, 0),
    (another_run_behind, 0),
    (of_an_older_version, 3),
    (damaged_digests, 0),
]


@pytest.fixture(scope="module")
def finished(folder: Path, assistant: Assistant, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation: data and out, to be copied."""
    root = tmp_path_factory.mktemp("finished")
    write_data(root / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.Assistant, "from_pretrained", lambda *_, **__: assistant)
        options = ["custom.max_new_tokens=4"]
        found = runner.evaluate(folder, ["custom"], root / "data", root / "out", options=options)
    assert found["custom"]["run"]["answered_now"] == 3
    return root


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


@pytest.fixture(scope="module")
def short(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose context is 320."""
    path = tmp_path_factory.mktemp("short") / "final"
    save_model(make_model(max_position_embeddings=320), tokenizer, build_image_processor(tiny_config()), path)
    return path


def hard_questions(data: Path, most: int) -> None:
    """Five that are whole, one too long, one with room for three tokens, one that no picture can be shown for, one
    whose picture is damaged. most: characters that fill the context."""
    picture(data / "a.bmp", RED)
    (data / "bad.bmp").write_bytes(b"BM")
    rows = [{"id": f"q{i}", "image": "a.bmp", "question": f"colour {i}?", "answer": "x"} for i in range(5)]
    rows.insert(1, {"id": "long", "image": "a.bmp", "question": "what colour is it? " * 60, "answer": "x"})
    rows.insert(3, {"id": "tight", "image": "a.bmp", "question": "x" * (most - 3), "answer": "x"})
    rows.append({"id": "tag", "question": "what does <image> mean?", "answer": "x"})
    rows.append({"id": "bad", "image": "bad.bmp", "question": "what?", "answer": "x"})
    write_jsonl(data / "questions.jsonl", rows)


def test_one_bad_question_costs_one_question(short, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("tinyllava_fast.eval.runner.log.propagate", True)
    monkeypatch.setattr(custom, "_check_markers", lambda *_: None)  # which finds "tag" before the engine does
    picture(tmp_path / "a.bmp", RED)
    engine = Assistant.from_pretrained(short, device="cpu", batch_tokens=1024).engine
    (one,) = engine.run([Request.ask("x", tmp_path / "a.bmp")])
    hard_questions(tmp_path / "data", 321 - one.prompt_tokens)
    options = {"options": ["custom.max_new_tokens=48"], "device": "cpu"}
    found = runner.evaluate(short, ["custom"], tmp_path / "data", tmp_path / "out", **options)["custom"]
    said, ended = answers(tmp_path / "out"), finishes(tmp_path / "out")
    assert {k: v for k, v in ended.items() if v not in ("eos", "length", "context")} == {
        "long": "too long",
        "tag": "refused",
        "bad": "unreadable image",
    }
    assert [k for k, text in said.items() if text == ""] == ["long", "tag", "bad"] and ended["tight"] == "context"
    counts = found["counts"]
    assert (counts["answered"], counts["too long"], counts["refused"], counts["unreadable"]) == (9, 1, 1, 1)
    assert counts["context full"] == 1 and list(found["not_answered"]) == ["long", "tag"]
    assert "context of 320" in found["not_answered"]["long"] and "'tag'" in found["not_answered"]["tag"]
    assert "scored as an empty answer: request 'long'" in caplog.text and "bad.bmp" in caplog.text
    # those that were found wrong beforehand stand in front, and a run that goes on has the same results
    log = tmp_path / "out/custom/answers.jsonl"
    keys = [r["key"] for r in map(json.loads, log.read_text().splitlines()) if "key" in r]
    assert keys[:2] == ["long", "tag"]
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    log = tmp_path / "again/custom/answers.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:5]))
    resumed = runner.evaluate(short, ["custom"], tmp_path / "data", tmp_path / "again", **options)["custom"]
    assert resumed.pop("run")["answered_now"] == 6 and found.pop("run") and resumed == found
    assert (tmp_path / "again/custom/verdicts.jsonl").read_bytes() == (
        tmp_path / "out/custom/verdicts.jsonl"
    ).read_bytes()


def test_a_pool_too_small_is_refused_before_the_first_answer(folder, tmp_path):
    rows = [{"id": id, "question": "a" * n, "answer": "b"} for id, n in (("short", 5), ("long", 900))]
    write_jsonl(tmp_path / "questions.jsonl", rows)
    with pytest.raises(UserError, match=r"custom: request 'long': .* exceed the K/V pool; raise it to 1\d\d\d"):
        runner.evaluate(folder, ["custom"], tmp_path, tmp_path / "out", device="cpu", batch_tokens=1000)
    assert '"key"' not in (tmp_path / "out/custom/answers.jsonl").read_text()


def test_every_file_of_a_model_is_part_of_it(folder, tmp_path):
    """Weights, config (template, image mode), tokenizer, processor, adapter; not what tlf-eval writes there."""
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m/adapter").mkdir()
    (tmp_path / "m/adapter/adapter_model.safetensors").write_bytes(b"x")
    (tmp_path / "m/adapter/adapter_config.json").write_text("{}")
    first = model_digest(tmp_path / "m")
    assert first == model_digest(tmp_path / "m")
    files = [p for p in (tmp_path / "m").rglob("*") if p.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= {p.name for p in files}
    for file in files:
        before = file.read_bytes()
        file.write_bytes(before + b" ")
        assert model_digest(tmp_path / "m") != first, file
        file.write_bytes(before)
    (tmp_path / "m/custom").mkdir()
    for name in ("results.json", "report.html", "custom/answers.jsonl"):
        (tmp_path / "m" / name).write_text("{}")
    assert model_digest(tmp_path / "m", besides=tmp_path / "m") == first != model_digest(tmp_path / "m")


def test_a_tower_elsewhere_and_plugins_are_part_of_a_model(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "tower").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps({"mm_vision_tower": str(tmp_path / "tower")}))
    (tmp_path / "tower/model.safetensors").write_bytes(b"x")
    first = model_digest(tmp_path / "m")
    (tmp_path / "tower/model.safetensors").write_bytes(b"xy")
    assert model_digest(tmp_path / "m") != first
    plugin = tmp_path / "mine.py"
    plugin.write_text("a = 1\n")
    one = plugins_digest([str(plugin), "json"])
    plugin.write_text("a = 2\n")
    assert plugins_digest([str(plugin), "json"]) != one != plugins_digest([str(plugin)])
    with pytest.raises(CheckpointError, match="no such model folder"):
        model_digest(tmp_path / "none")


def log_of(folder, run, *keys):
    return AnswerLog(folder, run, {k: f"question {k}" for k in keys})


def test_answers_of_another_run_or_question_are_not_mixed_in(tmp_path):
    with log_of(tmp_path, {"model": "a"}, "1", "2") as first:
        first.add("1", "yes", finish="eos")
        first.add("2", "no", finish="eos")
    assert log_of(tmp_path, {"model": "a"}, "1", "2").texts == {"1": "yes", "2": "no"}
    assert AnswerLog(tmp_path, {"model": "a"}, {"1": "another question", "2": "question 2"}).texts == {"2": "no"}
    with log_of(tmp_path, {"model": "b"}, "3") as other:
        assert other.texts == {}
        other.add("3", "yes", finish="eos")
    assert log_of(tmp_path, {"model": "b"}, "3").texts == {"3": "yes"}


def test_seconds_add_up_over_sessions(tmp_path):
    spent = []
    for number in range(3):
        with log_of(tmp_path, {}, "0", "1", "2") as session:
            time.sleep(0.002)
            session.add(str(number), "x", finish="eos")
            spent.append(session.seconds)
    assert spent == sorted(spent) and spent[-1] >= 0.006
    assert log_of(tmp_path, {}).seconds == pytest.approx(spent[-1], abs=1e-3)


WHOLE_RECORD = {"key": "1", "answer": "a", "seconds": 1, "asked": "question 1", "finish": "eos", "tokens": 1}


@pytest.mark.parametrize(
    "line",
    ["{}", "[1]", "nonsense", '{"key": "1"}', "\udcff", '{"key": "1", "key": "2"}', "null"]
    + [json.dumps({**WHOLE_RECORD, name: value}) for name in ("key", "answer", "asked") for value in (None, 3, ["a"])]
    + [json.dumps({**WHOLE_RECORD, "seconds": value}) for value in (None, "1", True, [])],
)
def test_a_foreign_answers_file_is_refused(tmp_path, line):
    head = '{"run": {}}\n{"session": 0}\n'
    (tmp_path / "answers.jsonl").write_bytes(f"{head}{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"answers\.jsonl, line 3: not a record of an evaluation"):
        log_of(tmp_path, {}, "1")


@pytest.mark.parametrize("head", ['{"session": 0}\n', json.dumps(WHOLE_RECORD) + "\n", '{"run": {}}\n'])
def test_an_answers_file_without_its_head_is_refused(tmp_path, head):
    (tmp_path / "answers.jsonl").write_text(head + json.dumps(WHOLE_RECORD) + "\n")
    with pytest.raises(DataError, match=r"answers\.jsonl, line [12]: not a record of an evaluation"):
        log_of(tmp_path, {}, "1")


def test_what_an_answer_belongs_to():
    """Prompt, pictures, their number and their order, and what the protocol prescribes: all different."""
    plain = Question(key="1", id=1, prompt="a")
    variants = [
        asked(plain, []),
        asked(plain, ["x"]),
        asked(plain, ["x", "y"]),
        asked(plain, ["y", "x"]),
        asked(plain, ["xy"]),
        asked(plain, ["x", "x"]),
        asked(Question(key="1", id=1, prompt="ax"), []),
        asked(Question(key="1", id=1, prompt="a\0x"), []),
        asked(Question(key="1", id=1, prompt="a", canned="x"), []),
        asked(Question(key="1", id=1, prompt="a", canned=""), []),
        asked(Question(key="1", id=1, prompt="a\ud800"), []),
    ]
    assert len(set(variants)) == len(variants)
    assert asked(plain, ["x"]) == asked(Question(key="2", id=7, prompt="a", truth="b", category="c"), ["x"])


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files cannot grow beyond 700 bytes, as on a disk that is all but full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_answers_before_a_full_disk_are_kept(tmp_path, small_files):
    keys = [str(n) for n in range(20)]
    with (
        pytest.raises(UserError, match=r"answers\.jsonl: cannot be written: File too large"),
        log_of(tmp_path, {}, *keys) as first,
    ):
        for key in keys:
            first.add(key, "x" * 50, finish="eos")
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    kept = len(log_of(tmp_path, {}, *keys).records)
    assert 1 <= kept <= 5
    with log_of(tmp_path, {}, *keys) as second:
        for key in keys[kept:]:
            second.add(key, "x" * 50, finish="eos")
    assert list(log_of(tmp_path, {}, *keys).records) == keys


def test_answers_in_a_folder_that_is_removed_are_kept(tmp_path, caplog):
    keys = [str(n) for n in range(6)]
    with log_of(tmp_path / "out", {}, *keys) as log:
        for key in keys:
            log.add(key, key, finish="eos")
            if key == "3":
                shutil.rmtree(tmp_path / "out")
    assert log_of(tmp_path / "out", {}, *keys).texts == {k: k for k in keys}


@pytest.mark.parametrize("where", ["file", "file/below", "file/far/below"])
def test_an_output_that_cannot_be_written_is_a_sentence(evaluate, finished, folder, tmp_path, where, caplog):
    (tmp_path / "file").write_text("")
    arguments = ["--benchmarks", "custom", "--data", finished / "data", "--output", tmp_path / where]
    assert cli.main([str(a) for a in (folder, *arguments)]) == 2
    with pytest.raises(UserError, match=r"file.*: cannot be written: .*name another folder"):
        evaluate(finished / "data", tmp_path / where)
    with pytest.raises(UserError, match="cannot be written"):
        evaluate(finished / "data", tmp_path / where, blind=True)


def test_results_that_cannot_be_written_are_a_sentence(evaluate, finished, tmp_path):
    """Each of the files in turn is a folder that nothing can replace."""
    for name in ("results.json", "verdicts.jsonl", "official", "../results.json"):
        out = tmp_path / name.replace("/", "_")
        shutil.copytree(finished / "out", out)
        path = out / "custom" / name
        if path.is_dir():
            shutil.rmtree(path)
            path.write_text("")
        else:
            path.unlink()
            (path / "in the way").mkdir(parents=True)
        with pytest.raises(UserError, match="cannot be written"):
            evaluate(finished / "data", out)
        assert (out / "custom/answers.jsonl").read_bytes() == (finished / "out/custom/answers.jsonl").read_bytes()


def test_paths_that_lead_nowhere_are_missing_pictures(evaluate, tmp_path):
    rows = [{"id": i, "image": i, "question": "what?", "answer": "x"} for i in ("a.bmp", "x" * 250, "a.bmp/b")]
    write_jsonl(tmp_path / "questions.jsonl", rows)
    picture(tmp_path / "a.bmp", RED)
    with pytest.raises(UserError, match="2 of 3 images are missing"):
        evaluate(tmp_path, tmp_path / "o")
    assert evaluate(tmp_path, tmp_path / "o", missing_images="empty")["counts"]["unreadable"] == 2


def test_half_a_surrogate_pair_is_written_escaped():
    assert json.loads(line_of({"a": "\ud800é"})) == {"a": "\ud800é"} and "\\ud800" in line_of({"a": "\ud800"})
    assert line_of({"a": "é"}) == '{"a": "é"}\n'


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
