"""The numbers of ``stats`` for readers: a table for a terminal, JSON, and a page with plots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from html import escape

from tinyllava_fast.page import card, columns, document, facts_list
from tinyllava_fast.prepare.overlap import Shared
from tinyllava_fast.prepare.stats import Spread, Stats

_HEAD = ("least", "median", "mean", "95 %", "most")
_SHARED = (
    ("same_image", "records show an image of it"),
    ("near_image", "records show such an image, or one that looks like it"),
    ("same_question", "records ask a question of it"),
    ("both", "records ask the same about the same image, or one that looks like it"),
)


def text(found: Stats) -> str:
    """Return the numbers as a table of text."""
    lines = [f"{found.name}: looked at in {found.seconds:.1f} s"]
    lines += [f"{count:>14,}  {name}" for name, count in found.counts.items()]
    lines += [f"{share:>14.1%}  {name}" for name, share in found.shares.items()]
    lines.append(f"\n{'':>26}" + "".join(f"{name:>12}" for name in _HEAD))
    lines += [f"  {name:<24}" + "".join(f"{v:>12}" for v in _values(spread)) for name, spread in found.spreads.items()]
    for shared in found.shared:
        lines.append(f"\nof the {shared.questions:,} questions of {shared.file}:")
        lines += [f"{count:>14,}  {words}" for count, words in _faults(shared)]
        lines += [f"{count:>14,}  {words}" for count, words in _overlap(shared)]
        lines += [f"    {where}" for where in shared.first]
    return "\n".join([*lines, ""])


def as_dict(found: Stats) -> dict[str, object]:
    """For JSON."""
    return asdict(found)


def page(found: Iterable[Stats]) -> str:
    """Return the numbers as one HTML file, plots inside it."""
    return document("What the set holds", "\n".join(part for one in found for part in _source(one)))


def _source(found: Stats) -> Iterator[str]:
    yield f'<header><h1>{escape(found.name)}</h1><p class="note">looked at in {found.seconds:.1f} s</p></header>'
    rows = [(f"{count:,}", name) for name, count in found.counts.items()]
    rows += [(f"{share:.1%}", name) for name, share in found.shares.items()]
    yield card("Counts", "", facts_list(rows))
    plots = [
        card(escape(name[:1].upper() + name[1:]), "", _plot(name, spread)) for name, spread in found.spreads.items()
    ]
    yield f'<div class="two">\n{"".join(plots)}\n</div>'
    for shared in found.shared:
        named = "".join(f"<li>{escape(where)}</li>" for where in shared.first)
        counts = [*_faults(shared), *_overlap(shared)]
        inside = facts_list((f"{count:,}", words) for count, words in counts) + f"<ul>{named}</ul>" * bool(named)
        yield card(f"Overlap with {escape(shared.file)}", f"It has {shared.questions:,} questions.", inside)


def _plot(name: str, spread: Spread) -> str:
    ticks = [_short(spread.least + share * (spread.most - spread.least)) for share in (0, 0.5, 1)]
    said = f"median {_short(spread.median)}, mean {_short(spread.mean)}, 95 % up to {_short(spread.p95)}"
    return columns(spread.bins, ticks, name, said)


def _overlap(shared: Shared) -> Iterator[tuple[int, str]]:
    for field, words in _SHARED:
        if (count := getattr(shared, field)) is not None:
            yield count, words


def _faults(shared: Shared) -> Iterator[tuple[int, str]]:
    """Yield what of the evaluation set was not compared."""
    if shared.left_out:
        yield shared.left_out, "entries of it cannot be read, and are left out"
    if shared.unreadable:
        yield shared.unreadable, f"of its {shared.images:,} images cannot be read, and are not looked for"


def _values(spread: Spread) -> Iterator[str]:
    for value in (spread.least, spread.median, spread.mean, spread.p95, spread.most):
        yield _short(value)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:,.1f}"
