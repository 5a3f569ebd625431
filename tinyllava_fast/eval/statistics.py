"""Standard errors clustered by image, and tests for two models on the same questions. No torch.

Questions about one image are not independent, so residuals are summed within an image before they are squared:
SE = sqrt(sum over images (sum of residuals)^2) / n.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import Answers, Metric, Question
from tinyllava_fast.eval.types import Histogram

if TYPE_CHECKING:
    from _typeshed import SupportsRichComparison


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean; 0 of nothing."""
    return math.fsum(values) / len(values) if values else 0.0


def clustered_error(influence: Iterable[float], clusters: Iterable[Hashable]) -> float | None:
    """Return the standard error of an estimate from each observation's influence; None with fewer than two clusters.

    influence: sums to 0; for a mean (x - mean) / n, for others see ratio_influence. clusters: one hashable each.
    """
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(influence, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value
    return math.sqrt(math.fsum(s * s for s in sums.values())) if len(sums) > 1 else None


def mean_influence(values: Sequence[float]) -> list[float]:
    """Return the influence of each value on their mean."""
    centre = mean(values)
    return [(v - centre) / len(values) for v in values]


def ratio_influence(upper: Sequence[float], lower: Sequence[float]) -> list[float]:
    """Return each observation's influence on sum(upper) / sum(lower), to first order; F1 is such a ratio."""
    total = math.fsum(lower)
    if not total:
        return [0.0] * len(upper)
    ratio = math.fsum(upper) / total
    return [(u - ratio * v) / total for u, v in zip(upper, lower, strict=True)]


def mean_metric(
    name: str, questions: Sequence[Question], credit: dict[str, float], *, scale: float = 100.0, digits: int = 2
) -> Metric:
    """Return the mean credit of the questions times scale, with its standard error clustered by image."""
    values = [credit[q.key] for q in questions]
    error = clustered_error(mean_influence(values), [q.cluster for q in questions])
    return Metric(
        name=name,
        value=scale * mean(values),
        scale=scale,
        stderr=None if error is None else scale * error,
        questions=len(values),
        digits=digits,
    )


def by_group(
    questions: Sequence[Question],
    credit: dict[str, float],
    groups: Sequence[SupportsRichComparison],
    *,
    scale: float = 100.0,
    digits: int = 2,
) -> list[Metric]:
    """Return mean_metric of each group, groups sorted. groups: one hashable, sortable value per question."""
    members: dict[SupportsRichComparison, list[Question]] = {}
    for question, group in zip(questions, groups, strict=True):
        members.setdefault(group, []).append(question)
    return [mean_metric(str(g), members[g], credit, scale=scale, digits=digits) for g in sorted(members)]


def require_answers(benchmark: str, questions: Sequence[Question], answers: Answers) -> None:
    """Raise DataError, with the count and the first ids, if a question has no answer."""
    missing = [q for q in questions if q.key not in answers]
    if missing:
        first = ", ".join(repr(q.id) for q in missing[:3])
        raise DataError(
            f"{benchmark}: {len(missing):,} of {len(questions):,} questions have no answer (ids {first}"
            f"{', ...' if len(missing) > 3 else ''}); its score is defined over all of them"
        )


def exact_sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value that a fair coin splits wins + losses at least as unevenly. 1 with none."""
    total = wins + losses
    ways = tail = 1  # of choosing 0
    for k in range(min(wins, losses)):
        ways = ways * (total - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**total)


def histogram(values: Sequence[float], bins: int = 30) -> Histogram:
    """Return percentiles, and counts in equal bins from 0 to the maximum; {} of nothing."""
    if not values:
        return {}
    order = sorted(values)
    top = order[-1] or 1.0
    counts = [0] * bins
    for value in order:
        counts[min(bins - 1, int(bins * value / top))] += 1
    p50, p95, p99 = (order[min(len(order) - 1, len(order) * p // 100)] for p in (50, 95, 99))
    return {"count": len(order), "p50": p50, "p95": p95, "p99": p99, "max": order[-1], "bins": counts}
