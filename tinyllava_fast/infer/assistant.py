"""A loaded model that answers questions: what ``tinyllava_fast.load`` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.data.tokenizer import largest_id
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.types import Images, Request, Sampling, Scores
from tinyllava_fast.infer.weights import check_finite, check_weights, prepare_weights
from tinyllava_fast.models.io import load_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Assistant:
    """Answers questions about images. Wraps an Engine; ``assistant.engine`` takes conversations and streams."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str | None = None,
        device: str = "auto",
        weights: str | None = None,
        **engine_options: Any,
    ) -> Assistant:
        """Open a model folder.

        dtype: "float32", "bfloat16", "float16"; None: as saved. device: "auto" (CUDA when there is
            one), "cpu", "cuda", ...
        weights: of the language model. "bf16" is dtype="bfloat16"; "int8", "nf4": quantised, on CPUs; None: dense.
        engine_options: keyword arguments of Engine (batch_tokens or kv_cache_bytes, prefill_tokens, threads, compile).
        Raises UserError for an unknown dtype or weights, CheckpointError if the folder is not a model of this toolkit.
        """
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"unknown dtype {dtype!r}; have {', '.join(DTYPES)}")
        check_weights(weights)
        if weights == "bf16":
            if dtype not in (None, "bfloat16"):
                raise UserError(f"weights='bf16' with dtype={dtype!r}; leave one of them out")
            dtype = "bfloat16"
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        lmm, tokenizer, processor = load_model(path, dtype=DTYPES[dtype] if dtype else None, device=device)
        check_finite(lmm, largest_id(tokenizer)[1] + 1, str(path))
        prepare_weights(lmm, weights)
        template = TEMPLATES.get(lmm.config.template, "config.json: template")
        engine_options.setdefault("image_mode", lmm.config.image_mode)
        engine_options.setdefault("source", path)
        if engine_options["image_mode"] == "anyres":
            engine_options.setdefault("image_grid", lmm.config.image_grid)
        return cls(Engine(lmm.eval(), tokenizer, processor, template, **engine_options))

    def answer(
        self,
        image: Images | None,
        question: str,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Answer one question. Greedy unless temperature > 0; the settings are those of Sampling.

        image: path, PIL image, or None; or a list of them, which the question's ``<image>`` markers stand for in order
            (none: they precede the question).
        on_text: called with each piece of the answer as soon as it is certain; the pieces add up to the answer.
        """
        sampling = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop
        )

        def on_token(_: str, piece: str) -> None:
            if on_text is not None:
                on_text(piece)

        requests = [Request.ask(question, image, sampling=sampling)]
        return self.engine.answers(requests, on_token if on_text is not None else None)[0].text

    def answer_many(self, questions: Iterable[tuple[Images | None, str]], *, max_new_tokens: int = 64) -> list[str]:
        """Answer (image, question) pairs together, greedily, in order; questions about one image share its work."""
        sampling = Sampling(max_new_tokens=max_new_tokens)
        requests = [Request.ask(question, image, sampling=sampling) for image, question in questions]
        return [a.text for a in self.engine.answers(requests)]

    def score(self, image: Images | None, question: str, options: Sequence[str]) -> Scores:
        """How probable each option is as the answer, all in one pass; ``options[scores.best]`` is the likeliest.

        Arguments as for ``answer``. UserError if there are no options.
        """
        (scores,) = self.engine.score([(Request.ask(question, image), options)])
        return scores
