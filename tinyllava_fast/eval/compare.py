"""Two models on the same questions, paired: difference, standard error clustered by image, exact sign test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tinyllava_fast.errors import UserError
from tinyllava_fast.eval.benchmarks.base import BENCHMARKS
from tinyllava_fast.eval.files import is_file, is_folder
from tinyllava_fast.eval.official import read_answers
from tinyllava_fast.eval.options import describe
from tinyllava_fast.eval.plan import Plan
from tinyllava_fast.eval.results import RESULTS, VERDICTS, read_results, read_verdicts
from tinyllava_fast.eval.statistics import clustered_error, exact_sign_test, mean, mean_influence
from tinyllava_fast.fields import Fields, shown


@dataclass(frozen=True)
class Comparison:
    """B against A. a, b: mean credit 0..1 over the common questions. stderr: of b - a, clustered by image, None with
    fewer than two images. b_better, a_better: questions on which one earned more. p_sign: two-sided exact sign test on
    those, which is McNemar's exact test where credit is 0 or 1. only_a, only_b: questions that one of them lacks.
    different: what differs between the two -> on how many of the common questions. scored: how the two are scored
    differently; unseen: whose pictures are not on record, so that they were not compared. "" if nothing is.
    """

    benchmark: str
    questions: int
    only_a: int
    only_b: int
    a: float
    b: float
    stderr: float | None
    b_better: int
    a_better: int
    p_sign: float
    binary: bool
    different: Mapping[str, int] = field(default_factory=dict)
    scored: str = ""
    unseen: str = ""

    @property
    def p_difference(self) -> float | None:
        """Two-sided normal p-value of the difference, with the clustered error; None where that is none or 0."""
        if not self.stderr:
            return None
        return math.erfc(abs(self.b - self.a) / self.stderr / math.sqrt(2))

    def __str__(self) -> str:
        """A few lines for a terminal."""
        error = "" if self.stderr is None else f" ± {100 * self.stderr:.2f} (clustered by image)"
        chance = "" if self.p_difference is None else f", p = {self.p_difference:.3g}"
        name = "McNemar's exact test" if self.binary else "exact sign test"
        lines = [
            f"{self.benchmark}: {self.questions:,} common questions",
            f"  A {100 * self.a:.2f}   B {100 * self.b:.2f}   mean credit x 100",
            f"  B - A = {100 * (self.b - self.a):+.2f}{error}{chance}",
            f"  B better on {self.b_better:,}, A better on {self.a_better:,}: {name}, p = {self.p_sign:.3g}",
        ]
        if self.different:
            counts = ", ".join(f"{what} {count:,}" for what, count in self.different.items())
            lines.append(f"  asked differently, on so many questions: {counts}")
        if self.scored:
            lines.append(f"  scored differently: {self.scored}")
        if self.unseen:
            lines.append(f"  pictures not compared, those of {self.unseen} are not on record: {UNSEEN}")
        if self.only_a or self.only_b:
            lines.append(f"  left out: {self.only_a:,} questions of A alone, {self.only_b:,} of B alone")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Row:
    """One scored question. pictures: digests of what they show; None where no picture was looked at."""

    credit: float
    cluster: str | tuple[str, ...]
    prompt: str | None
    truth: str | None
    pictures: Sequence[str] | None

    @property
    def unseen(self) -> bool:
        """True if it is about pictures of which nothing is known."""
        return self.pictures is None and isinstance(self.cluster, tuple)


@dataclass(frozen=True)
class _Side:
    """One of the two. options: those of its benchmark, as far as they are known."""

    benchmark: str
    options: Mapping[str, object]
    rows: Mapping[str, _Row]


def compare(a: Path, b: Path, plan: Plan | None = None, *, allow_different: bool = False) -> Comparison:
    """Compare two results folders of one benchmark, or answer files, which need the plan of their benchmark.

    allow_different: pair questions by key even where their prompts, right answers or pictures differ, as for one model
    on clean and on noisy pictures, and however they are scored. Pictures are known only to folders that an evaluation
    wrote which saw them. Raises UserError if they are of different benchmarks, have no common question, earn no credit
    per question, were asked about different data, or are scored differently.
    """
    left_side, right_side = _side(a, plan), _side(b, plan)
    name_a, rows_a = left_side.benchmark, left_side.rows
    name_b, rows_b = right_side.benchmark, right_side.rows
    if name_a != name_b:
        raise UserError(f"{a} holds {name_a} and {b} holds {name_b}; only one benchmark can be compared")
    scored = _scored(left_side, right_side)
    if scored and not allow_different:
        raise UserError(
            f"{a} and {b} are scored differently: {scored}; evaluate one of them again with the other's option, which "
            "asks no question anew, or compare them as they are with --allow-different"
        )
    keys = [key for key in rows_a if key in rows_b]
    if not keys:
        raise UserError(f"{a} and {b} have no scored question in common; check that both are scored and of one split")
    different = {what: _differing(what, rows_a, rows_b, keys) for what in ("prompt", "truth", "pictures")}
    if any(different.values()) and not allow_different:
        raise UserError(_refusal(a, b, different, len(keys)))
    left, right = [rows_a[k].credit for k in keys], [rows_b[k].credit for k in keys]
    differences = [y - x for x, y in zip(left, right, strict=True)]
    b_better, a_better = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return Comparison(
        benchmark=name_a,
        questions=len(keys),
        only_a=len(rows_a) - len(keys),
        only_b=len(rows_b) - len(keys),
        a=mean(left),
        b=mean(right),
        stderr=clustered_error(mean_influence(differences), [rows_a[k].cluster for k in keys]),
        b_better=b_better,
        a_better=a_better,
        p_sign=exact_sign_test(b_better, a_better),
        binary={*left, *right} <= {0.0, 1.0},
        different={NAMES[what]: len(found) for what, found in different.items() if found},
        scored=scored,
        unseen=" and ".join(
            name for name, rows in (("A", rows_a), ("B", rows_b)) if any(rows[key].unseen for key in keys)
        ),
    )


NAMES = {"prompt": "prompt", "truth": "right answer", "pictures": "pictures"}
UNSEEN = "it was blind, is an answers file, or is of an older version (evaluate again to record them)"


def _scored(a: _Side, b: _Side) -> str:
    """Return the options by which the two are scored differently, as far as both sides know them."""
    names = BENCHMARKS.get(a.benchmark).scored_by if a.benchmark in BENCHMARKS.names() else ()
    pairs = ((name, a.options.get(name), b.options.get(name)) for name in names)
    return ", ".join(
        f"{a.benchmark}.{name} is {shown(x)} for A and {shown(y)} for B"
        for name, x, y in pairs
        if x is not None and y is not None and x != y
    )


def _differing(what: str, a: Mapping[str, _Row], b: Mapping[str, _Row], keys: Sequence[str]) -> list[str]:
    """Return the keys of the questions whose prompt, truth or pictures differ, as far as both sides know them."""
    pairs = ((key, getattr(a[key], what), getattr(b[key], what)) for key in keys)
    return [key for key, x, y in pairs if x is not None and y is not None and x != y]


def _refusal(a: Path, b: Path, different: dict[str, list[str]], common: int) -> str:
    every = dict.fromkeys(key for keys in different.values() for key in keys)
    parts = [f"{len(keys):,} in their {NAMES[what]} (first: {keys[0]!r})" for what, keys in different.items() if keys]
    return (
        f"{a} and {b} are about different data: {len(every):,} of {common:,} common questions differ, "
        f"{', '.join(parts)}; evaluate both on the same data, or pair them as they are with --allow-different"
    )


def _side(path: Path, plan: Plan | None) -> _Side:
    """Return the benchmark, its options, and the scored questions by key."""
    if not is_file(path) and not is_folder(path):
        raise UserError(f"{path}: there is no such results folder or answers file")
    if is_folder(path):
        folders: Sequence[Path] = [path] if is_file(path / VERDICTS) else sorted(path.glob(f"*/{VERDICTS}"))
        if len(folders) != 1:
            raise UserError(f"{path}: no results of one benchmark; give the folder that holds {VERDICTS}")
        folder = folders[0] if folders[0].is_dir() else folders[0].parent
        rows = {
            v["key"]: _Row(
                v["credit"], tuple(v["images"]) or v["key"], v.get("prompt"), v.get("truth"), v.get("pictures")
            )
            for v in read_verdicts(folder)
            if v["credit"] is not None
        }
        results = Fields(read_results(folder), str(folder / RESULTS))
        options = results.mapping("options", None)
        return _Side(results.text("benchmark"), {} if options is None else options.values, rows)
    if plan is None:
        raise UserError(f"{path}: to compare answer files give --data and one name in --benchmarks")
    answers = read_answers(path, plan.benchmark, plan.everything)
    answered = [q for q in plan.everything if q.key in answers]
    credit = plan.benchmark.score(answered, answers).credit
    rows = {
        q.key: _Row(credit[q.key], tuple(map(str, q.images)) or q.key, q.prompt, q.truth, None)
        for q in answered
        if q.key in credit
    }
    return _Side(plan.name, describe(plan.benchmark), rows)
