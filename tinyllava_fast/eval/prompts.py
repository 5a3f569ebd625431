"""Sentences that the reference's question files and evaluators append to questions, and the template around them."""

from __future__ import annotations

from tinyllava_fast.eval.benchmarks.base import Question

SHORT = "\nAnswer the question using a single word or phrase."
IMAGE_MARKER = "<image>"
OPTION = "\nAnswer with the option's letter from the given choices directly."


def whole_prompt(question: Question) -> str:
    """System sentence, ``<image>``, question and the opening of the answer, in LLaVA's and TinyLLaVA's template.

    Some answers files hold it.
    """
    from tinyllava_fast.data.templates.base import SYSTEM  # imports torch

    image = "<image>\n" * len(question.images)
    return f"{SYSTEM} USER: {image}{question.prompt} ASSISTANT:"
