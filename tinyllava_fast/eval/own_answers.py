"""Comparing replies with the answers of a user's own questions: texts, and the options of a choice.

Texts are compared as VQA benchmarks do (``normalize_m4c``), which makes some different texts equal or empty: "C++" and
"C", "-1" and "1", "<" and nothing. Here the options of a question are told apart whatever they are, a text that
normalization empties is compared by itself, and a number's sign counts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from tinyllava_fast.eval.vqa_text import normalize_m4c

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_AROUND = " \t\r\n.,;:!?()[]\"'*`"
_KEYBOARD = {
    **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},
    **str.maketrans("\u2018\u2019\u201c\u201d\u00ab\u00bb", "''" + '"' * 4),
    **str.maketrans("\u3002\u3001\u2026\u300c\u300d\u3000", '.,."" '),
}
"""Full-width signs, curly and angle quotes, the full stop, comma and quotes of Chinese and Japanese."""
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
"""Thai, Lao, Burmese, Khmer, kana, Chinese characters."""
_NEGATIVE = re.compile(r"[-\u2212]\s*\.?\d")
_ANNOUNCED = r"(?:(?:the|my|correct|right|best|final|answer|option|choice|letter|is|would|be)\b[\s:*]*)+"
_LETTER_FORMS = (
    re.compile(r"\(?([A-Z])(?:[.):,]|\s*$|\s*\n)"),  # "A", "A. dog", "(A) dog", "A, since ...", a line of its own
    re.compile(r"[(\[]?([A-Za-z])[)\].:]*\s*(?:$|\n)"),  # "a", "[A]", "(a)."
    re.compile(
        rf"(?i:{_ANNOUNCED})[(\[]?([A-Z])[)\]]?(?:[.:,]|\s*$|\s*\n)"
    ),  # "Answer: A", "The answer is (A).", "Option A"
    re.compile(rf"(?i:(?:{_ANNOUNCED})?)[(\[]?([A-Z])[)\]]? is (?:the )?(?:right|correct|best|true|answer)\b"),
)


def key_of(text: str) -> str:
    """Return a key that is equal for texts that say the same; of a text that normalization empties, the text itself."""
    text = _typed(text)
    plain = text.strip().casefold()
    return normalize_m4c(text) or plain.strip(_AROUND) or plain


def equal(said: str, truth: str) -> bool:
    """Return True if a reply is the true answer, but for case, articles and punctuation; a number's sign counts."""
    signs = {bool(_NEGATIVE.match(_typed(text))) for text in (said, truth)}
    return key_of(said) == key_of(truth) and len(signs) == 1


def contains(said: str, truth: str) -> bool:
    """Return True if the true answer stands in a reply as whole words; one that normalization empties, as written.

    In scripts that put no space between words it may stand anywhere.
    """
    wanted, given = normalize_m4c(_typed(truth)), normalize_m4c(_typed(said))
    if wanted:
        return wanted in given if _UNSPACED.search(wanted) else f" {wanted} " in f" {given} "
    return key_of(truth) in [key_of(word) for word in said.split()]


def option_of(text: str, choices: Sequence[str]) -> int | None:
    """Index of the option that a text names, by its words or else by its letter; None if it names none.

    The words are compared as they stand, then without case, then normalized, each only if it tells all options apart.
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


def _typed(text: str) -> str:
    """A text as an English keyboard types it, as far as it can: quotes, full-width signs, marks of other scripts.

    The texts of plain ASCII, which benchmarks hold, stay as they are.
    """
    return unicodedata.normalize("NFC", text).translate(_KEYBOARD).strip()


def _caseless(text: str) -> str:
    return " ".join(text.casefold().split())


def _caseless_sentence(text: str) -> str:
    return _caseless(text).rstrip(".") or _caseless(text)


_KEYS: tuple[Callable[[str], str], ...] = (str.strip, _caseless, _caseless_sentence, key_of)
