"""What tlf-data looks at: the records that a command line names, or every source of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_fast.config.load import load_run
from tinyllava_fast.config.schema import DataConfig
from tinyllava_fast.data.formats._base import base_of
from tinyllava_fast.data.templates.base import TEMPLATES, Template
from tinyllava_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONFIGS = (".yaml", ".yml")


@dataclass(frozen=True)
class LookedAt:
    """One source. data: of it alone. tokenizer: None leaves tokens out."""

    name: str
    data: DataConfig
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def template(self) -> Template:
        """The chat template that its records are shown with."""
        return TEMPLATES.get(self.data.template, "data.template")


def looked_at(
    target: str, image_folder: str | None = None, template: str | None = None, tokenizer: str | None = None
) -> list[LookedAt]:
    """Return the sources of a run's configuration (a YAML file), each once, or the only one that records are.

    image_folder, template: of records, in place of their own folder and of llama; a configuration names them itself.
    tokenizer: folder or hub id; None: of a configuration its own, of records none. UserError.
    """
    from tinyllava_fast.data.tokenizer import load_tokenizer

    own = None if tokenizer is None else load_tokenizer(tokenizer)
    if Path(target).suffix not in _CONFIGS:
        folder = str(base_of(target)) if image_folder is None else image_folder
        data = DataConfig(records=target, image_folder=folder, template=template or "llama")
        found = [LookedAt(target, data, own)]
    else:
        if image_folder is not None or template is not None:
            raise UserError(f"{target}: a configuration names its image folders and templates; leave out the flags")
        found = _of_run(target, own)
    for one in found:
        if one.tokenizer is not None:
            one.template.check(one.tokenizer, one.data.masks)
    return found


def _of_run(path: str, tokenizer: PreTrainedTokenizerBase | None) -> list[LookedAt]:
    from tinyllava_fast.models.build import build_tokenizer

    run = load_run(path)
    tokenizer = build_tokenizer(run.model) if tokenizer is None else tokenizer
    found: list[LookedAt] = []
    known = set()
    for stage in run.stages:
        for source, alone in stage.data.under(run.data_root).each():
            key = (alone.records, alone.image_folder, alone.template, alone.turns, alone.masks)
            if key not in known:
                found.append(LookedAt(f"{stage.name}.{source.title}", alone, tokenizer))
            known.add(key)
    return found
