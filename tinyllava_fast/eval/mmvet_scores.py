"""MM-Vet's scores: mean grades over all questions, per capability and per set of capabilities, over several runs.

graded, everywhere: question key -> one grade 0..1 a run. Sums and rounding are numpy's, in the order of
mm-vet_evaluator.py, so that tables agree with the official ones to the last digit.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tinyllava_fast.eval.benchmarks.base import Metric, Question
from tinyllava_fast.eval.statistics import mean_metric

Graded = Mapping[str, Sequence[float]]
Groups = Callable[[Question], Sequence[str]]


def capabilities(question: Question) -> list[str]:
    """The capabilities that a question needs."""
    return list(question.meta["capabilities"])


def integration(question: Question) -> list[str]:
    """The set of capabilities that a question needs, as one name."""
    return [question.category]


def metric(name: str, questions: Sequence[Question], graded: Graded) -> Metric:
    """Mean grade x 100, averaged over the runs."""
    runs = len(next(iter(graded.values())))
    sums = [0.0] * runs
    for q in questions:
        for run in range(runs):
            sums[run] += graded[q.key][run]
    error = mean_metric(name, questions, {q.key: sum(graded[q.key]) / runs for q in questions}).stderr
    value = float((np.array(sums) / len(questions) * 100).mean())
    return Metric(name=name, value=value, stderr=error, questions=len(questions), digits=1)


def run_totals(questions: Sequence[Question], graded: Graded) -> list[float]:
    """The total of each run."""
    runs = len(graded[questions[0].key])
    return [metric("", questions, {q.key: [graded[q.key][run]] for q in questions}).value for run in range(runs)]


def table(questions: Sequence[Question], graded: Graded, groups: Groups) -> list[Metric]:
    """The metric of every group, the largest first, then by name. groups: the names of those a question belongs to."""
    sizes = Counter(name for q in questions for name in groups(q))
    names = sorted(sizes, key=lambda name: (-sizes[name], name))
    return [metric(name, [q for q in questions if name in groups(q)], graded) for name in names]


def score_csv(experiment: str, questions: Sequence[Question], graded: Graded, groups: Groups) -> str:
    """The evaluator's table: one column a group, then total, std and runs. Groups of several names are joined by _."""
    total = metric("total", questions, graded)
    runs = run_totals(questions, graded)
    columns = [*table(questions, graded, groups), total]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["", *(m.name.replace("+", "_") for m in columns), "std", "runs"])
    writer.writerow(
        [experiment, *rounded([m.value for m in columns]), *rounded([float(np.std(runs))]), str(rounded(runs))]
    )
    return text.getvalue()


def rounded(values: Sequence[float]) -> list[float]:
    """One decimal, by numpy's rounding."""
    return [float(v) for v in np.round(np.array(values), 1)]
