"""An assistant that can also be looked into: what ``tinyllava_fast.load`` returns."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from tinyllava_fast.errors import UserError
from tinyllava_fast.infer import assistant
from tinyllava_fast.infer.fast_model.adapters import Adapters
from tinyllava_fast.infer.types import Images, Request, Sampling
from tinyllava_fast.look.curves import Fill
from tinyllava_fast.look.looker import NEUTRAL, Looker
from tinyllava_fast.look.types import Look
from tinyllava_fast.models.io import load_model
from tinyllava_fast.models.lmm import LMM


class Assistant(assistant.Assistant):
    """Answers questions about images, and shows where its answers come from."""

    _folder: tuple[str | Path, str | Path | None] | None = None  # of the model, of its adapter

    @classmethod
    def from_pretrained(cls, path: str | Path, *, adapter: str | Path | None = None, **options: Any) -> Assistant:
        """See the base class."""
        made = super().from_pretrained(path, adapter=adapter, **options)
        assert isinstance(made, cls)  # noqa: S101 the base class makes one of cls
        made._folder = path, adapter
        return made

    @cached_property
    def looker(self) -> Looker:
        """Return what looks into this model's answers.

        Gradients need the plain weights: where the engine's are made ready for decoding, or quantized, they are read
        once more, and the look is at those.
        """
        return self.separate_looker() if self.engine.model.ready else Looker(self.engine.lmm, self.engine)

    def separate_looker(self) -> Looker:
        """Return what looks into this model's answers while the engine runs in another thread: with its own weights.

        A look watches the model's layers, and would see what the engine runs through the same ones.
        """
        if self._folder is None:
            raise UserError("this assistant's weights are made ready for decoding; open its folder to look inside")
        return Looker(plain_model(*self._folder, like=self.engine.lmm), self.engine)

    def look(
        self,
        image: Images,
        question: str,
        *,
        max_new_tokens: int = 32,
        neutral: str = NEUTRAL,
        fill: Fill | None = "mean",
        seed: int = 0,
    ) -> Look:
        """Answer a question greedily and return the look inside the answer. Arguments as for ``answer``.

        neutral: the question that attention is relative to. fill: what replaces parts of the picture in the deletion
        and insertion curves, its "mean" colour or a "blur" of it; None: no curves, which take most of the time.
        Raises UserError as ``answer``, and without an image.
        """
        request = Request.ask(question, image, sampling=Sampling(max_new_tokens=max_new_tokens))
        return self.looker.look(request, self.engine.answer(request).tokens, neutral=neutral, fill=fill, seed=seed)


def plain_model(folder: str | Path, adapter: str | Path | None, *, like: LMM) -> LMM:
    """Return the model of a folder as it was trained, in the dtype and on the device of another, in eval mode."""
    lmm, _, _ = load_model(folder, dtype=like.dtype, device=str(like.device))
    if adapter is not None:
        adapters = Adapters(lmm)
        adapters.merge(adapters.read(adapter))
    return lmm.eval().requires_grad_(False)
