"""No damage of an official or own file ends in a traceback, and nothing is scored that was not asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.eval.damage import BUILDERS, Damage, Spoilt
from tinyllava_fast.eval import cli
from tinyllava_fast.eval.benchmarks.base import Question
from tinyllava_fast.eval.options import build
from tinyllava_fast.eval.plan import Plan, make_plans

SHARE = 20
"""Every which damage the quick test tries; the slow one tries all."""


def plan_of(name: str, folder: Path) -> Plan:
    bench, options, _ = BUILDERS[name]
    return make_plans(build([bench], options), folder, missing_images="ignore")[0]


def flags(name: str, folder: Path) -> list[str]:
    bench, options, _ = BUILDERS[name]
    return ["--benchmarks", bench, "--data", str(folder), *(f"--option={option}" for option in options)]


def questions_of(plan: Plan) -> list[Question]:
    return list(plan.everything)


def answers_file(plan: Plan, path: Path) -> None:
    rows = [{"key": q.key, "answer": q.truth or "A"} for q in questions_of(plan)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fault_of(name: str, spoilt: Spoilt, damage: Damage, whole: Plan, answers: Path) -> str | None:
    """What is wrong with how the commands take the damage; None if nothing is."""
    run = flags(name, spoilt.folder)
    try:
        code = cli.main([*run, "--dry-run"])
        if code not in (0, 2):
            return f"the dry run's exit code is {code}"
        if code == 2:
            return None
        plan = plan_of(name, spoilt.folder)
        answers_file(plan, answers)
        code = cli.main([*run, "--score-only", str(answers)])
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    if code != 0:
        return f"after a dry run without an error, scoring every answer exits with {code}"
    return lost_pictures(whole, plan)


def lost_pictures(whole: Plan, plan: Plan) -> str | None:
    """A question that is still asked about as many pictures as before, unless its file says that there is none."""
    before = {q.key: q for q in questions_of(whole)}
    for q in questions_of(plan):
        known = before.get(q.key)
        if known is not None and len(q.images) < len(known.images) and q.canned is None:
            return f"question {q.key!r} lost {len(known.images) - len(q.images)} of its pictures"
        if any(isinstance(v, str) and v in ("None", "nan", "True", "{}", "[]") for v in (q.prompt, q.truth)):
            return f"question {q.key!r} is asked as {q.prompt!r}, truth {q.truth!r}"
    return None


def tried(name: str, tmp_path: Path, share: int) -> tuple[int, list[str]]:
    """How many damages were tried, and the faults."""
    spoilt = Spoilt(tmp_path / "data", BUILDERS[name][2])
    whole, count, faults = plan_of(name, spoilt.folder), 0, []
    for number, damage in enumerate(spoilt.each()):
        if number % share:
            continue
        count += 1
        if fault := fault_of(name, spoilt, damage, whole, tmp_path / "answers.jsonl"):
            faults.append(f"{damage.name}: {fault}")
    return count, faults


ALLOWED = {
    # Own questions may be about no picture, or one: nothing tells that there was another.
    "custom": (
        "image: drop",
        "image: null",
        "image: []",
        "images: drop",
        "images: null",
        "images: []",
        "images.1: drop",
    ),
}


def unexpected(name: str, faults: list[str]) -> list[str]:
    allowed: tuple[str, ...] = ALLOWED.get(BUILDERS[name][0], ())
    return [f for f in faults if not any(f"{a}: question" in f and "lost" in f for a in allowed)]


@pytest.mark.parametrize("name", BUILDERS)
def test_some_damages(name: str, tmp_path: Path, capsys: Any) -> None:
    count, faults = tried(name, tmp_path, SHARE)
    assert count > 3 and not unexpected(name, faults)


@pytest.mark.slow
@pytest.mark.no_cover  # test_some_damages counts; under coverage this takes twice as long
@pytest.mark.parametrize("name", BUILDERS)
def test_all_damages(name: str, tmp_path: Path, capsys: Any) -> None:
    count, faults = tried(name, tmp_path, 1)
    assert count > 50 and not unexpected(name, faults)
