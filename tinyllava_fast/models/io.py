"""Model folders: config.json, model.safetensors, tokenizer files and preprocessor_config.json; adapter/ after LoRA.

Weights carry transformers' own names under ``llm.``, ``vision.`` and ``connector.``; a tied weight is stored once.
A folder needs nothing but itself to be loaded, no file is a pickle, and a save that fails leaves the old one alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import tinyllava_fast
from tinyllava_fast.config.load import parse_into
from tinyllava_fast.data.tokenizer import load_tokenizer as read_plain_tokenizer
from tinyllava_fast.errors import CheckpointError, UserError
from tinyllava_fast.fields import Fields, read_json
from tinyllava_fast.files import atomic_folder
from tinyllava_fast.models import adapter
from tinyllava_fast.models.connectors.base import CONNECTORS
from tinyllava_fast.models.described import check_parts, processor_fields, reading
from tinyllava_fast.models.hf import cast_parameters, config_of, config_to_dict
from tinyllava_fast.models.llm.base import LLMS
from tinyllava_fast.models.lmm import LMM, LMMConfig
from tinyllava_fast.models.sources import folders_in
from tinyllava_fast.models.vision.base import VISION, VisionTower
from tinyllava_fast.tensors import TensorFile, mismatches, open_weights

MODEL_TYPE = "tinyllava_fast"
WEIGHTS = "model.safetensors"
T = TypeVar("T")
_GIVE = "give a folder that tlf-train wrote"


def describe(lmm: LMM) -> LMMConfig:
    """The LMMConfig that rebuilds this model's architecture."""
    return LMMConfig(
        llm={
            "type": lmm.family.name,
            "config": config_to_dict(lmm.llm.config),
            "options": asdict(lmm.family.options),
        },
        vision=lmm.vision.to_config(),
        connector=lmm.connector.to_config(),
    )


def save_model(
    lmm: LMM,
    tokenizer: PreTrainedTokenizerBase,
    processor: Any,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a model folder, atomically: either all of it is there or what was there before.

    state_dict: the full weights under ``lmm.state_dict()``'s names where the module holds only a shard of them.
    LoRA layers go to ``adapter/``, and config.json says so; model.safetensors keeps the stock names.
    Raises CheckpointError if the folder cannot be written, for instance because the disk is full.
    """
    weights, adapted = adapter.split(lmm, state_dict if state_dict is not None else lmm.state_dict())
    tied = lmm.tied_names()
    stored = {k: v.detach().cpu().contiguous() for k, v in weights.items() if k not in tied}
    config = {
        "model_type": MODEL_TYPE,
        **asdict(lmm.config),
        "dtype": str(_dtype_of(stored)).removeprefix("torch."),
        "versions": {
            "tinyllava_fast": tinyllava_fast.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    with atomic_folder(folder) as temporary:
        save_file(stored, temporary / WEIGHTS, metadata={"format": "pt"})
        tokenizer.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        if adapted:
            adapter.write(lmm, adapted, temporary / adapter.FOLDER)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def _dtype_of(weights: Mapping[str, Tensor]) -> torch.dtype:
    return next((t.dtype for name, t in weights.items() if name.startswith("llm.") and t.is_floating_point()))


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    merge_adapter: bool = True,
) -> tuple[LMM, PreTrainedTokenizerBase, Any]:
    """(model in eval mode, tokenizer, image processor) of a model folder. dtype None: the stored one.

    The folder may also be of another project, in a layout that models/checkpoints knows; it is opened in place.
    merge_adapter: add a LoRA adapter to the weights, in float32; False keeps its layers in the model.
    Raises CheckpointError if the folder is of no known layout, is damaged, or does not fit its own config.
    """
    folder = Path(folder)
    if is_foreign(folder):
        from tinyllava_fast.models.checkpoints.load import open_checkpoint

        opened = open_checkpoint(folder, dtype=dtype, device=device, merge=merge_adapter)
        return opened.lmm, opened.tokenizer, opened.processor
    config, stored_dtype = read_config(folder)
    adapted, config.has_lora = config.has_lora, False
    merging = adapted and merge_adapter
    lmm = skeleton(config, stored_dtype if merging else dtype or stored_dtype, str(folder / "config.json"))
    load_weights(lmm, folder)
    if adapted:
        path = folder / adapter.FOLDER
        live = lmm.dtype
        adapter.attach(lmm, adapter.read(path), str(path), dtype=torch.float32)
        if not merging:
            adapter.lower(lmm, live)
    if merging:
        adapter.merge(lmm, dtype)
        cast_parameters(lmm, dtype or stored_dtype)
    return lmm.to(device).eval(), load_tokenizer(folder), load_processor(folder)


def is_foreign(folder: str | Path) -> bool:
    """Whether the folder has a config.json that another project wrote."""
    try:
        values = read_json(Path(folder) / "config.json")
    except UserError:
        return False
    return isinstance(values, dict) and values.get("model_type") not in (None, MODEL_TYPE)


def check_folder(folder: str | Path) -> None:
    """Raise CheckpointError if it is no model folder, with a hint at the one inside a run folder or of a like name."""
    folder = Path(folder)
    if os.path.isfile(folder / "config.json"):
        return
    inside = [name for name in ("final", *folders_in(folder)) if os.path.isfile(folder / name / "config.json")]
    if inside:
        raise CheckpointError(f"{folder}: not a model folder, but one lies in it: give {folder / inside[0]}")
    if os.path.exists(folder):
        if os.path.isfile(folder):
            raise CheckpointError(
                f"{folder}: not a model folder: it is a file; give the folder that it is in: {folder.parent}"
            )
        around = Path(os.path.abspath(folder)).parent
        hint = f"the folder around it is one: {around}" if (around / "config.json").is_file() else _GIVE
        raise CheckpointError(f"{folder}: not a model folder: it has no config.json; {hint}")
    close = get_close_matches(folder.name, folders_in(folder.parent), n=1)
    hint = f"did you mean {folder.parent / close[0]}?" if close else _GIVE
    raise CheckpointError(f"{folder}: not a model folder: it does not exist; {hint}")


def read_config(folder: str | Path) -> tuple[LMMConfig, torch.dtype]:
    """The config.json of a model folder and the dtype that its weights are stored in."""
    check_folder(folder)
    path = Path(folder) / "config.json"
    values = read_json(path, CheckpointError)
    found = values.pop("model_type", None) if isinstance(values, dict) else None
    if found != MODEL_TYPE:
        raise CheckpointError(f"{path}: model_type is {found!r}, expected {MODEL_TYPE!r}: not a model of this toolkit")
    values.pop("versions", None)
    if "adapter" in values:  # as folders before version 0.2 call it
        values["has_lora"] = values.pop("adapter")
    dtype = getattr(torch, str(values.pop("dtype", "float32")), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{path}: dtype is not a torch dtype")
    check_parts(Fields(values, str(path), CheckpointError))
    try:
        return parse_into(LMMConfig, values, str(path)), dtype
    except UserError as error:
        raise CheckpointError(str(error)) from None


def load_weights(lmm: LMM, source: str | Path, *, skip: Collection[str] = ()) -> None:
    """Copy the weights of a model folder (or .safetensors file) into the model; every name and shape must fit.

    skip: names that the caller fills.
    Raises CheckpointError listing what is missing, unexpected or of another shape.
    """
    path = Path(source) / WEIGHTS if Path(source).is_dir() else Path(source)
    _load_into(lmm, open_weights(path), tied=lmm.tied_names(), skip=skip, prefix="")


def load_component(module: nn.Module, path: str | Path, component: str) -> None:
    """Fill one component from a .safetensors file, whose names may carry the component's prefix."""
    file = open_weights(Path(path))
    prefix = f"{component}." if any(k.startswith(f"{component}.") for k in file) else ""
    _load_into(module, file, prefix=prefix)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer stored in a model folder."""
    if is_foreign(folder):
        from tinyllava_fast.models.checkpoints.load import open_tokenizer

        return open_tokenizer(folder)
    return read_tokenizer(str(folder), None)


def read_tokenizer(source: str, gguf_file: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, hub id or GGUF file."""
    if gguf_file is None:
        with reading(f"{source}: its tokenizer's files cannot be read", UserError):
            return read_plain_tokenizer(source)
    from transformers import AutoTokenizer

    with reading(f"{Path(source) / gguf_file}: no tokenizer can be read from it", UserError):
        return AutoTokenizer.from_pretrained(source, gguf_file=gguf_file, trust_remote_code=False)


def load_processor(folder: str | Path) -> Any:
    """The image processor stored in a model folder: the PIL class of its tower."""
    if is_foreign(folder):
        from tinyllava_fast.models.checkpoints.load import open_processor

        return open_processor(folder)
    config, _ = read_config(folder)
    return read_processor(VISION.get(config.vision["type"], f"{Path(folder) / 'config.json'}: vision.type"), folder)


def read_processor(tower: type[VisionTower], folder: str | Path) -> Any:
    """The image processor of a folder, as the PIL class of a tower. Raises CheckpointError unless it makes pixels."""
    fields = processor_fields(folder)
    with reading(f"{fields.where if fields else folder}: the image processor cannot be read"):
        processor = tower.processor_class.from_pretrained(str(folder))
        pixels = processor(Image.new("RGB", (16, 16)), return_tensors="np")["pixel_values"]
        if not np.isfinite(pixels).all():
            raise ValueError("it makes pixels that are not finite")
    return processor


def skeleton(config: LMMConfig, dtype: torch.dtype, where: str) -> LMM:
    """The architecture with uninitialized weights. Raises UserError for a config that makes none."""
    with reading(f"{where}: no model can be made of it"):
        llm_class = LLMS.get(config.llm["type"], f"{where}: llm.type")
        family = llm_class(_options(llm_class.Options, config.llm, where, "llm.options"))
        stored = config_of(None, config.llm["config"], f"{where}: llm.config", strict=False)
        llm = family.build(stored, seed=None, dtype=dtype, where=f"{where}: llm")
        vision = tower_skeleton(config, dtype, where)
        kind = CONNECTORS.get(config.connector["type"], f"{where}: connector.type")
        options = _options(kind.Options, config.connector, where, "connector.options")
        connector = kind(vision.hidden_size, llm.config.hidden_size, options).to(dtype)
        try:
            return LMM(llm, vision, connector, family, config)
        except UserError as error:  # parts that do not fit each other, named as in a run's configuration
            raise UserError(f"{where}: {error}") from error


def _options(cls: type[T], part: Mapping[str, Any], where: str, key: str) -> T:
    """Return the options of a part. Raise UserError for a key or value that the component does not take."""
    return parse_into(cls, part.get("options") or {}, where, key=key)


def tower_skeleton(config: LMMConfig, dtype: torch.dtype, where: str) -> VisionTower:
    """The vision tower with uninitialized weights."""
    tower = VISION.get(config.vision["type"], f"{where}: vision.type")
    return tower.from_config(
        config.vision["config"],
        feature_layer=-1,
        feature_select=config.vision["feature_select"],
        options=_options(tower.Options, config.vision, where, "vision.options"),
        seed=None,
        dtype=dtype,
        where=f"{where}: vision",
        strict=False,
    )


def _load_into(
    module: nn.Module, file: TensorFile, *, prefix: str, tied: Collection[str] = (), skip: Collection[str] = ()
) -> None:
    found = {k.removeprefix(prefix): s for k, s in file.shapes.items() if k.startswith(prefix)}
    found = {k: s for k, s in found.items() if k not in skip}
    expected = {k: tuple(v.shape) for k, v in module.state_dict().items() if k not in tied and k not in skip}
    if lines := mismatches(expected, found):
        raise CheckpointError(f"{file.path}: the weights are of another architecture:\n" + "\n".join(lines))
    module.load_state_dict({k: file[prefix + k] for k in found}, strict=False)
