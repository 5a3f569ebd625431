"""Comparing replies with the answers of a user's own questions: texts, and the options of a choice.

Texts are compared as VQA benchmarks do (``normalise_m4c``), which makes some different texts equal or empty: "C++" and
"C", "-1" and "1", "<" and nothing. Here the options of a question are told apart whatever they are, a text that
normalisation empties is compared by itself, and a number's sign counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from tinyllava_fast.eval.vqa_text import normalise_m4c

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_AROUND = " \t\r\n.,;:!?()[]\"'*`"
_NEGATIVE = re.compile(r"[-\u2212]\s*\.?\d")
_ANNOUNCED = r"(?:(?:the|my|correct|right|best|final|answer|option|choice|letter|is|would|be)\b[\s:*]*)+"
_LETTER_FORMS = (
    re.compile(r"\(?([A-Z])(?:[.):,]|\s*$)"),  # "A", "A. dog", "(A) dog", "A, since ..."
    re.compile(r"[(\[]?([A-Za-z])[)\].:]*$"),  # "a", "[A]", "(a)."
    re.compile(rf"(?i:{_ANNOUNCED})[(\[]?([A-Z])[)\]]?(?:[.:,]|\s*$)"),  # "Answer: A", "The answer is (A).", "Option A"
    re.compile(rf"(?i:(?:{_ANNOUNCED})?)[(\[]?([A-Z])[)\]]? is (?:the )?(?:right|correct|best|true|answer)\b"),
)


def key_of(text: str) -> str:
    """What two texts have in common if they say the same; of a text that normalisation empties, the text itself."""
    plain = text.strip().casefold()
    return normalise_m4c(text) or plain.strip(_AROUND) or plain


def equal(said: str, truth: str) -> bool:
    """Whether a reply is the true answer, but for case, articles and punctuation other than a number's sign."""
    signs = {bool(_NEGATIVE.match(text.strip())) for text in (said, truth)}
    return key_of(said) == key_of(truth) and len(signs) == 1


def contains(said: str, truth: str) -> bool:
    """Whether the true answer stands in a reply as whole words; one that normalisation empties, as it is written."""
    wanted = normalise_m4c(truth)
    if wanted:
        return f" {wanted} " in f" {normalise_m4c(said)} "
    return key_of(truth) in [key_of(word) for word in said.split()]


def option_of(text: str, choices: Sequence[str]) -> int | None:
    """Index of the option that a text names, by its words or else by its letter; None if it names none.

    The words are compared as they stand, then without case, then normalised, each only if it tells all options apart.
    """
    if not text.strip():
        return None
    for key in _KEYS:
        keys = [key(choice) for choice in choices]
        if len(set(keys)) == len(keys) and key(text) in keys:
            return keys.index(key(text))
    plain = text.replace("*", "").replace("`", "").strip()
    letters = (form.match(plain) for form in _LETTER_FORMS)
    letter = next((found.group(1).upper() for found in letters if found), None)
    index = -1 if letter is None else LETTERS.index(letter)
    return index if 0 <= index < len(choices) else None


def _caseless(text: str) -> str:
    return " ".join(text.casefold().split())


def _caseless_sentence(text: str) -> str:
    return _caseless(text).rstrip(".") or _caseless(text)


_KEYS: tuple[Callable[[str], str], ...] = (str.strip, _caseless, _caseless_sentence, key_of)
