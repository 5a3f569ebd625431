"""Answers to MMMU questions: the letter or the values in a reply, and whether they are right.

Rules of the official evaluation (MMMU-Benchmark/MMMU, utils/eval_utils.py), oddities included: a published score is
the one that these rules give.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_STRIPPED = (",", ".", "!", "?", ";", ":", "'")
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234,567
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.5e-3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # 12 and 12.5
)
Value = str | float


def chosen_letter(reply: str, options: Mapping[str, str]) -> str | None:
    """The letter that a reply chooses, or None where the official evaluation draws one at random.

    options: letter -> its text, in order. Letters in brackets go before free-standing ones, and those before an
    option's text, which is looked for in replies of more than five words only. Of several, the last named wins.
    """
    for mark in _STRIPPED:
        reply = reply.strip(mark)
    text = f" {reply} "
    for pattern in ("({})", " {} "):
        found = {letter: text.rfind(pattern.format(letter)) for letter in options}
        if any(place >= 0 for place in found.values()):
            return _last(found)
    if len(text.split()) > 5:
        found = {letter: text.lower().rfind(option.lower()) for letter, option in options.items()}
        if any(place >= 0 for place in found.values()):
            return _last(found)
    return None


def _last(places: Mapping[str, int]) -> str:
    return max(places, key=lambda letter: places[letter])  # max keeps the first of equals


def open_values(reply: str) -> list[Value]:
    """Candidate answers in a reply to an open question: what follows the words that announce an answer, and numbers.

    Numbers are rounded to two decimals, texts are lower case. Duplicates are removed; the order means nothing.
    """
    pieces = reply.strip().strip(".").lower().split("\n")
    spans = []
    for number, piece in enumerate(pieces):
        indicators = (*_INDICATORS, "=") if number == len(pieces) - 1 else _INDICATORS
        shortest = ""
        for announced in (piece.rsplit(word, 1)[1].strip() for word in indicators if word in piece):
            if not shortest or len(announced) < len(shortest):  # an empty one gives way to whatever comes next
                shortest = announced
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            spans.append(shortest)
    spans = spans or [reply.strip().strip(".").lower()]
    numbers = [number for span in spans for pattern in _NUMBERS for number in re.findall(pattern, span)]
    return list(dict.fromkeys(value for text in [*spans, *numbers] for value in normalize(text)))


def normalize(text: str) -> list[Value]:
    """A number, commas aside, rounded to two decimals; else the text in lower case, one character as " x" and "x "."""
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.strip().lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_is_right(values: Sequence[Value], truth: str | Sequence[str]) -> bool:
    """Return True if any candidate contains a true text or equals a true number."""
    truths = [value for text in ([truth] if isinstance(truth, str) else truth) for value in normalize(text)]
    texts = [t for t in truths if isinstance(t, str)]
    return any(any(t in value for t in texts) if isinstance(value, str) else value in truths for value in values)
