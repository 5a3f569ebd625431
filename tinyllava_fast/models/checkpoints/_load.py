"""Opening a checkpoint of another project in place: layout -> architecture -> every tensor checked, then copied."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.log import log
from tinyllava_fast.models import adapter
from tinyllava_fast.models.architecture import LMMConfig
from tinyllava_fast.models.checkpoints import _parts, _towers
from tinyllava_fast.models.checkpoints._base import Checkpoint, Folder, Sources, layout_of
from tinyllava_fast.models.checkpoints._lora import Lora
from tinyllava_fast.models.checkpoints._tensors import Stored
from tinyllava_fast.models.construct import build, build_tower
from tinyllava_fast.models.described import reading
from tinyllava_fast.models.llm.base import LLMS
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.models.sources import read_tokenizer
from tinyllava_fast.tensors import mismatches


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model of another project in our terms."""

    lmm: LMM
    tokenizer: PreTrainedTokenizerBase
    processor: BaseImageProcessor
    layout: str


def open_checkpoint(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    sources: Sources | None = None,
    template: str | None = None,
    merge: bool = True,
) -> Opened:
    """Open a folder of any registered layout, the model in eval mode.

    dtype None: the stored one. template None: the one that fits the tokenizer. merge False: a LoRA adapter stays live.
    Nothing is fetched that the folder or a local folder named in ``sources`` holds. Raises CheckpointError for an
    unknown layout and for tensors that are damaged, missing, unexpected or of another shape, listing all of them.
    """
    checkpoint = _describe(path, sources or Sources())
    tokenizer = _tokenizer(checkpoint)
    template = _template(checkpoint, tokenizer, template, str(path))
    config = dataclasses.replace(checkpoint.config, template=template or "")
    lmm = _build(checkpoint, config, dtype, str(path), merge)
    processor = _parts.image_processor(config.vision.type, lmm.image_size, checkpoint.processor_sources)
    log.info("%s: opened as %s, template %s", path, checkpoint.layout, template)
    if checkpoint.adapter is not None and not merge:
        _attach(lmm, checkpoint.adapter, str(path))
    return Opened(lmm.to(device).eval(), tokenizer, processor, checkpoint.layout)


def open_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of such a folder."""
    return _tokenizer(_describe(path, Sources()))


def open_processor(path: str | Path) -> BaseImageProcessor:
    """Return the image processor of such a folder."""
    checkpoint = _describe(path, Sources())
    with torch.device("meta"):
        tower = build_tower(checkpoint.config.vision, file=str(path))
    return _parts.image_processor(tower.name, tower.image_size, checkpoint.processor_sources)


def _describe(path: str | Path, sources: Sources) -> Checkpoint:
    folder = Folder(path)
    with reading(f"{folder.path / 'config.json'}: no model can be made of it and the files beside it"):
        return layout_of(folder).open(folder, sources)


def _tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    tokenizer = read_tokenizer(checkpoint.tokenizer, None)
    LLMS.get(checkpoint.config.llm.type)().prepare_tokenizer(tokenizer)
    return tokenizer


def _template(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, given: str | None, where: str) -> str | None:
    """Return the given chat template, or the one that fits the tokenizer; None, with a warning, if none does."""
    if given:
        TEMPLATES.get(given, "--template").check(tokenizer)
        return given
    llm = checkpoint.config.llm
    if fitting := _parts.fitting_template(tokenizer, llm.config["model_type"]):
        return fitting
    if tokenizer.chat_template and LLMS.get(llm.type).template == "tokenizer":
        return "tokenizer"
    log.warning(
        "%s: no chat template ends answers with %r; before asking it questions, import it with "
        "tlf-convert import --template NAME",
        where,
        tokenizer.eos_token,
    )
    return None


def _build(checkpoint: Checkpoint, config: LMMConfig, dtype: torch.dtype | None, where: str, merge: bool) -> LMM:
    weights = checkpoint.weights
    if dtype is None:
        stored = (w.dtype for name, w in weights.items() if name.startswith("llm.") and w.dtype.is_floating_point)
        dtype = next(stored, torch.float32)
    if checkpoint.adapter is not None and merge:
        weights = checkpoint.adapter.merge(weights, where)
    lmm = build(config, dtype=dtype, file=where)
    tied = lmm.tied_names()
    expected = {name: tensor for name, tensor in lmm.state_dict().items() if name not in tied}
    known = {n for n in weights if n not in expected and (n in tied or _is_irrelevant(n, lmm))}
    _check(expected, {n: stored for n, stored in weights.items() if n not in known}, checkpoint.unknown, where)
    ignored = [*checkpoint.ignored, *(weights[name].key for name in known)]
    if ignored:
        log.info("%s: of no use to this model, not loaded: %s", where, ", ".join(sorted(ignored)))
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(weights[name].read())
    return lmm


def _attach(lmm: LMM, lora: Lora, where: str) -> None:
    settings, tensors = lora.for_peft()
    config = adapter.import_peft().LoraConfig(**settings)
    adapter.attach(lmm, adapter.Adapter(config, tensors, {}), where)


def _is_irrelevant(name: str, lmm: LMM) -> bool:
    component, _, rest = name.partition(".")
    if component == "vision" and (number := _towers.layer_number(rest)) is not None:
        return number >= lmm.vision.num_layers
    return _parts.irrelevant(component, rest)


def _check(expected: dict[str, torch.Tensor], weights: dict[str, Stored], unknown: list[str], where: str) -> None:
    """Raise CheckpointError listing every tensor that is missing, unexpected, quantized or of another shape."""
    lines = mismatches(
        {name: tuple(tensor.shape) for name, tensor in expected.items()},
        {name: stored.shape for name, stored in weights.items()},
        needs="its config says",
        stored_as={name: stored.key for name, stored in weights.items()},
    )
    lines += [f"  unexpected: {key}" for key in unknown]
    lines += [
        f"  {name} (stored as {weights[name].key}) is {weights[name].dtype}: quantized, and its scales are not stored"
        for name, tensor in expected.items()
        if name in weights and tensor.is_floating_point() and not weights[name].dtype.is_floating_point
    ]
    if lines:
        raise CheckpointError(f"{where}: weights and config.json do not agree:\n" + "\n".join(lines))
