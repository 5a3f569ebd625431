"""This toolkit's engine."""

from __future__ import annotations

from collections.abc import Sequence

TITLE = "tinyllava_fast"
REQUIREMENTS: tuple[str, ...] = ()
PRECISIONS: dict[str, tuple[str, ...]] = {"bf16": (), "int8": (), "int4": ()}  # what its export is given
FORMAT = ""  # the model folder itself
CANNOT = ""


class Side:
    """The loaded model."""

    def __init__(self, model: str, precision: str, threads: int) -> None:
        import torch

        import tinyllava_fast

        torch.set_num_threads(threads)
        weights = {"bf16": None, "int8": "int8", "int4": "nf4"}[precision]
        self.engine = tinyllava_fast.load(model, dtype="bfloat16", weights=weights).engine

    def ask(self, questions: Sequence[tuple[str, str | None]], tokens: int) -> list[list[int]]:
        """Answer the questions, (text, image file), all at once, greedily, in so many tokens each."""
        from tinyllava_fast.infer.types import Request, Sampling

        sampling = Sampling(max_new_tokens=tokens, eos_token_id=())
        asked = [Request.ask(text, image, sampling=sampling) for text, image in questions]
        return [list(answer.tokens) for answer in self.engine.answers(asked)]
