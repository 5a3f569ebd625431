"""A question as the whole prompt of LLaVA's and TinyLLaVA's template, which some answers files hold."""

from __future__ import annotations

from tinyllava_fast.eval.benchmarks.base import Question


def whole_prompt(question: Question) -> str:
    """System sentence, ``<image>``, question and the opening of the answer."""
    from tinyllava_fast.data.templates.base import SYSTEM  # imports torch

    image = "<image>\n" * len(question.images)
    return f"{SYSTEM} USER: {image}{question.prompt} ASSISTANT:"
