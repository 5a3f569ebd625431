"""Confusion tables, of right answers and what was said, for questions whose answers come from a small set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from tinyllava_fast.eval.types import Verdict

MOST = 20  # answers in a table
LEAST = 2  # questions an answer, on average, below which a table says nothing
TABLES = 6  # of a benchmark
OTHER = "(other)"


@dataclass(frozen=True)
class Confusion:
    """Answers of one category. counts: (right answer, what was said) -> questions; OTHER: none of the right answers."""

    category: str
    answers: list[str]
    counts: Counter[tuple[str, str]]

    def row(self, truth: str) -> list[int]:
        """Questions with this right answer by what was said, OTHER last."""
        return [self.counts[truth, said] for said in [*self.answers, OTHER]]


def confusions(verdicts: Iterable[Verdict]) -> list[Confusion]:
    """A table for each category whose right answers are few and come up often; at most TABLES.

    Where each category has one right answer alone (photos sorted by what they show), one table of all of them.

    verdicts: as read_verdicts returns them. Answers are compared without case, outer spaces and end marks.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for v in verdicts:
        truth = _key(v["truth"])
        if truth:
            groups.setdefault(v["category"], []).append((truth, _key(v["answer"])))
    if len(groups) > 1 and all(len({truth for truth, _ in pairs}) == 1 for pairs in groups.values()):
        groups = {"": [pair for pairs in groups.values() for pair in pairs]}  # the category is the answer: one table
    tables = []
    for category, pairs in groups.items():
        answers = sorted({truth for truth, _ in pairs})
        if 2 <= len(answers) <= MOST and len(pairs) >= LEAST * len(answers):
            known = set(answers)
            counts = Counter((truth, said if said in known else OTHER) for truth, said in pairs)
            tables.append(Confusion(category, answers, counts))
    return tables[:TABLES]


def section(verdicts: Sequence[Verdict]) -> str:
    """The tables as HTML; empty where the answers are not of that kind."""
    tables = confusions(verdicts)
    if not tables:
        return ""
    note = "Rows: the right answer. Columns: what the model said. On the diagonal it is right."
    return f"<h3>Right answer and what was said</h3><p class='note'>{note}</p>" + "\n".join(map(_table, tables))


def _key(text: str | None) -> str:
    return " ".join((text or "").casefold().split()).strip(" .!?")


def _table(confusion: Confusion) -> str:
    columns = confusion.answers + [OTHER] * any(confusion.row(truth)[-1] for truth in confusion.answers)
    head = "".join(f"<th>{escape(name)}</th>" for name in [confusion.category or "right answer", *columns, "right"])
    rows = [f"<tr>{head}</tr>"]
    for number, truth in enumerate(confusion.answers):
        counts = confusion.row(truth)
        most = sum(counts)
        cells = "".join(
            f"<td class='{'hit' if i == number else 'miss'}' style='--share:{count / most:.2f}'>{count or ''}</td>"
            for i, count in enumerate(counts[: len(columns)])
        )
        rows.append(f"<tr><td>{escape(truth)}</td>{cells}<td>{100 * counts[number] / most:.0f} %</td></tr>")
    return "<table class='confusion'>\n" + "\n".join(rows) + "\n</table>"
