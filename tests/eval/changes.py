"""What may happen between two runs of an evaluation, and how many of its three questions the second one asks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from tests.eval.layouts import write_jsonl
from tests.eval.own import BLUE, ROWS, picture
from tinyllava_fast.eval.answers import line_of


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
