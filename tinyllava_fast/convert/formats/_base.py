"""The contract of export formats, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.registry import Registry


@dataclass(frozen=True)
class Model:
    """A model to export.

    lmm: in eval mode. names: hub ids of the parts, {llm, tokenizer, vision, vision2}. weights: number format that the
    language model, or more of the model, is quantized to, one of the format's ``weights``; None: none.
    """

    lmm: LMM
    tokenizer: PreTrainedTokenizerBase
    processor: BaseImageProcessor
    names: dict[str, str]
    weights: str | None = None
    source: Path | None = None
    """The folder it was read from."""
    pictures: Path | None = None
    """Folder of pictures on which a format tries what it changes (gguf: --keep-first-patch)."""


class Format(ABC):
    """One kind of folder."""

    name: ClassVar[str]
    merge_adapter: ClassVar[bool] = True
    """True: a LoRA adapter is added to the weights first."""
    takes_names: ClassVar[bool] = False
    """True: it states hub ids of the parts, which ``names`` of a model gives."""
    keeps_adapter: ClassVar[bool] = False
    """True: it can hold an adapter apart from the weights, for --keep-adapter."""
    weights: ClassVar[tuple[str, ...]] = ()
    """Number formats that it can quantize to, for --weights."""
    keeps_first_patch: ClassVar[bool] = False
    """True: it can hold a model that drops the first patch as one that keeps it, for --keep-first-patch."""
    is_repository: ClassVar[bool] = False
    """True: what it writes is for the Hub, for --push."""

    @abstractmethod
    def write(self, model: Model, folder: Path) -> None:
        """Fill an empty folder. Raises UserError naming the field that the format can't express, and why."""


FORMATS: Registry[type[Format]] = Registry("export format", "tinyllava_fast.convert.formats")
