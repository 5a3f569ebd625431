"""A model that is served: its name, its engine, and the live engine around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.live import LiveEngine
from tinyllava_fast.look.looker import Looker
from tinyllava_fast.serve.problems import ApiError


@dataclass(frozen=True)
class Served:
    """One model, or one of its adapters. created: seconds since 1970, for the list of models.

    base: of an adapter the model that it changes, whose engine answers. looker: looks inside answers, one at a time, if
    that was asked for.
    """

    name: str
    engine: Engine
    live: LiveEngine
    created: int
    base: Served | None = None
    looker: Looker | None = None

    def adapted(self, name: str, folder: str | Path) -> Served:
        """Load an adapter, and return what answers with it. UserError as for ``Engine.load_adapter``."""
        self.live.load_adapter(name, folder)
        return replace(self, name=name, base=self, looker=None)

    @property
    def adapter(self) -> str | None:
        """Return the name of the adapter; None for a model."""
        return None if self.base is None else self.name

    def warm_up(self) -> None:
        """Do before the first request what it would wait for, and others behind it."""
        self.live.warm_up()
        _ = self.most_characters

    @cached_property
    def most_characters(self) -> int | None:
        """Characters that surely do not fit the context: so many tokens of the longest kind; None: there is no limit.

        Texts above are refused at once, without the time that it takes to make tokens of them.
        """
        if self.context is None:
            return None
        return self.context * max(map(len, self.engine.tokenizer.get_vocab()))

    @property
    def context(self) -> int | None:
        """Most tokens of a prompt and its answer; None if the model names no limit."""
        return self.engine.context


def find(models: Mapping[str, Served], name: str | None) -> Served:
    """Return the model of that name, the first one for None. ApiError 404 if there is none."""
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        raise ApiError(404, f"The model {name[:80]!r} does not exist", param="model", code="model_not_found")
    return models[name]
