"""One of several data sets that a stage mixes, and how much of it an epoch has."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Annotated, Literal

from tinyllava_fast.config.ranges import FilePath, Located, Named, NonNegativeInt, PositiveFloat, PositiveInt, Text
from tinyllava_fast.errors import UserError

AMOUNTS = ("weight", "samples", "times")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several data sets that are mixed. What it does not say is as ``data`` says for all of them."""

    path: FilePath
    """Its records, in any form that ``data.records`` may have."""
    name: Text | None = None
    """Its name in metrics and messages; None: that of its file."""
    image_folder: Annotated[str, Located()] | None = None
    """Folder that its image paths are relative to; None: ``data.image_folder``."""
    weight: PositiveFloat | None = None
    """Its share of the samples of an epoch, relative to the other sources' weights. An epoch has as many samples as the
    sources together; a small source is shown several times in it, a large one goes on in the next."""
    samples: PositiveInt | None = None
    """Its samples in an epoch, whatever the others have."""
    times: PositiveFloat | None = None
    """All of its samples, so many times in an epoch; 0.5 shows one half in each epoch. Without any of weight, samples
    and times: once."""
    template: Annotated[Text, Named("chat template")] | None = None
    """Chat template; None: ``data.template``, which the model folder keeps."""
    turns: Literal["conversation", "independent"] | None = None
    """See ``data.turns``, which holds where this is None and which the model folder keeps."""
    turns_per_sample: NonNegativeInt | None = None
    """See ``data.turns_per_sample``, which holds where this is None."""
    stream: bool | None = None
    """See ``data.stream``, which holds where this is None."""

    def __post_init__(self) -> None:
        given = [name for name in AMOUNTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{given[1]}: given beside {given[0]!r}; keep one of {', '.join(AMOUNTS)}")

    def under(self, root: str) -> SourceConfig:
        """Return the same with files relative to ``root``; absolute paths stay."""
        folder = None if self.image_folder is None else under(root, self.image_folder)
        return replace(self, path=os.path.join(root, self.path), image_folder=folder)

    @property
    def title(self) -> str:
        """Its name, given or taken from the file."""
        return self.name or PurePath(self.path).name.partition(".")[0] or self.path


def under(root: str, folder: str) -> str:
    """Return a folder that is relative to ``root``, or absolute."""
    return os.path.normpath(os.path.join(root, folder))


def check_sources(sources: Sequence[SourceConfig], stream: bool) -> None:
    """Raise UserError for sources that do not go together; the message begins with the key ``sources``.

    stream: of those that do not say it.
    """
    for name, count in Counter(source.title for source in sources).items():
        if count > 1:
            raise UserError(f"sources: {count} of them are called {name!r}; give each a 'name' of its own")
    plain = [source.title for source in sources if source.weight is None]
    if plain and len(plain) < len(sources):
        raise UserError(
            f"sources: {plain[0]!r} has no weight, others have one; give a weight to all of them, or samples or times "
            "instead of each weight"
        )
    streams = [source for source in sources if (stream if source.stream is None else source.stream)]
    if streams and plain and (len(sources) > 1 or streams[0].samples or streams[0].times):
        raise UserError(
            f"sources: {streams[0].title!r} is a stream, whose records are not counted, so 'samples' and 'times' mean "
            "nothing: give a weight to each source"
        )
