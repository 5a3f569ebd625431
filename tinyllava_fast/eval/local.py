"""A model folder as the answerer of an evaluation: all questions go through one engine."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from tinyllava_fast.data.images import blank_image
from tinyllava_fast.eval.answerer import Effort, Reply
from tinyllava_fast.eval.benchmarks.base import Question
from tinyllava_fast.eval.machine import model_digest
from tinyllava_fast.eval.types import Facts
from tinyllava_fast.infer.assistant import Assistant
from tinyllava_fast.infer.finish import UNREADABLE
from tinyllava_fast.infer.types import Answer, Request, Sampling


class LocalModel:
    """A model folder that is opened when it is first needed: a finished evaluation is scored without it.

    besides: results that are written into the folder, which are no part of the model. The others as from_pretrained's.
    """

    asked_again: Collection[str] = ()

    def __init__(
        self,
        folder: str | Path,
        *,
        besides: Path,
        dtype: str | None,
        device: str,
        weights: str | None,
        adapter: str | Path | None,
        speculate: int,
        batch_tokens: int,
        threads: int,
    ) -> None:
        self.folder = folder
        self._options: dict[str, Any] = {
            "dtype": dtype, "device": device, "weights": weights, "batch_tokens": batch_tokens, "threads": threads,
            "adapter": adapter, "speculate": speculate,
        }  # fmt: skip
        self._loaded = False
        self.facts: Facts = {
            "model": str(folder),
            "model_digest": model_digest(folder, besides=besides, adapter=adapter),
            "dtype": dtype or "as saved",
        }
        if weights:
            self.facts["weights"] = weights

    @cached_property
    def assistant(self) -> Assistant:
        """The opened model."""
        self._loaded = True
        return Assistant.from_pretrained(self.folder, **self._options)

    @cached_property
    def blank(self) -> Image.Image:
        """The image that --blind shows in place of each."""
        engine = self.assistant.engine
        return blank_image(engine.processor, engine.lmm.image_size)

    def replies(
        self, questions: Sequence[Question], max_new_tokens: int, *, blind: bool, resumed: bool = False
    ) -> Generator[Reply, None, None]:
        """See Answerer: first those that are too long, then the others, by image."""
        engine = self.assistant.engine
        sampling = Sampling(max_new_tokens=max_new_tokens)
        entered: dict[str, float] = {}

        def request(q: Question) -> Request:
            images: list[Image.Image | Path] = [self.blank for _ in q.images] if blind else list(q.images)
            shown = (images[0] if len(images) == 1 else images) if images else None
            return Request.ask(q.prompt, shown, sampling=sampling, id=q.key)

        def entering() -> Iterator[Request]:
            for q in sorted(questions, key=lambda q: (q.cluster, q.key)):
                if q.key not in refused:
                    entered[q.key] = time.monotonic()
                    yield request(q)

        refused: set[str] = set()
        for answer in engine.refusals(asked for q in questions if not engine.surely_fits(asked := request(q))):
            refused.add(answer.id)
            yield _reply(answer, None)
        for answer in engine.run(entering(), keep_going=True):
            yield _reply(answer, time.monotonic() - entered.pop(answer.id))

    def effort(self) -> Effort:
        """See Answerer. Counters are of this process, over all benchmarks so far."""
        if not self._loaded:
            return Effort(counters={})
        engine = self.assistant.engine
        return Effort(counters=asdict(engine.counters), dtype=str(engine.lmm.dtype).removeprefix("torch."))


class LiveModel(LocalModel):
    """A model in memory, such as one that trains. name: of it as it is now, in the results."""

    def __init__(self, assistant: Assistant, name: str) -> None:
        self.__dict__["assistant"] = assistant  # which is opened already
        self.folder, self._loaded = name, True
        self.facts = {"model": name, "model_digest": name, "dtype": str(assistant.engine.lmm.dtype)}


def _reply(answer: Answer, latency: float | None) -> Reply:
    return Reply(
        key=answer.id,
        text=answer.text,
        finish=answer.finish,
        tokens=len(answer.tokens),
        latency=latency,
        why="" if answer.finish == UNREADABLE else answer.why,
    )
