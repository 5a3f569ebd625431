"""Answer normalization and accuracy of the VQA benchmarks, in the two variants the field uses.

m4c: what TextVQA is scored by, and what LLaVA and TinyLLaVA put through before a VQAv2 upload (TinyLLaVA Factory,
``m4c_evaluator``). official: the scorer of the VQA challenge (GT-Vision-Lab/VQA, ``vqaEval``). Their oddities are kept:
they are part of published numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = ("a", "an", "the")
CONTRACTIONS = dict(
    pair.split(":")
    for pair in """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've
    couldnt've:couldn't've didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've
    hasnt:hasn't havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's
    Id've:I'd've I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll
    let's:let's maam:ma'am mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've
    mustnt:mustn't mustve:must've neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at
    'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've
    shouldnt:shouldn't shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd
    somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's
    someoned:someone'd someoned've:someone'd've someone'dve:someone'd've someonell:someone'll someones:someone's
    somethingd:something'd somethingd've:something'd've something'dve:something'd've somethingll:something'll
    thats:that's thered:there'd thered've:there'd've there'dve:there'd've therere:there're theres:there's
    theyd:they'd theyd've:they'd've they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas
    wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's
    whatve:what've whens:when's whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've
    who'dve:who'd've wholl:who'll whos:who's whove:who've whyll:why'll whyre:why're whys:why's wont:won't
    wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll
    y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've
    you'dve:you'd've youll:you'll youre:you're youve:you've
""".split()
)

_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_REMOVED = 32  # the reference passes a flag where the count belongs
_COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
_BY_MATCHES = (0.0, 0.3, 0.6, 0.9)


def normalize_m4c(text: str) -> str:
    """An answer as TextVQA compares it and as VQAv2 uploads hold it.

    >>> normalize_m4c("The girl's 2 dogs, please.")
    "girl 's 2 dogs please"
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_punctuation(_one_line(text)))


def normalize_official(text: str) -> str:
    """An answer as the VQA challenge compares it, where the ten people did not all agree."""
    return _words(_punctuation(_one_line(text)))


def m4c_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """0..1: how far the prediction agrees with the ten people's answers, normalized by m4c. ValueError if not ten."""
    if len(answers) != 10:
        raise ValueError(f"{len(answers)} answers; ten are needed")
    return agreement(normalize_m4c(prediction), [normalize_m4c(a) for a in answers])


def official_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """0..1 as the VQA challenge scores it: raw text is compared if all people agree, normalized text if not."""
    prediction, answers = _one_line(prediction), [_one_line(a) for a in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalize_official(prediction), [_words(_punctuation(a)) for a in answers]
    return agreement(prediction, answers)


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the sets that leave one person out of min(1, matches / 3); for ten answers 0, .3, .6, .9, 1, 1, ..."""
    matches = sum(a == prediction for a in answers)
    return _BY_MATCHES[matches] if matches < len(_BY_MATCHES) else 1.0


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(text: str) -> str:
    """Marks beside a space are deleted, others become one. A comma between digits has all marks deleted."""
    out = text
    everything = bool(_COMMA_BETWEEN_DIGITS.search(text))
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or everything else " ")
    return _PERIOD.sub("", out, count=_PERIODS_REMOVED)


def _words(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
