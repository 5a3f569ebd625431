"""Folders of TinyLLaVA Factory: finetuned (one file), pretrained (one folder a part), LoRA. Also its hub releases.

Their nested configs leave out what equals the class defaults of transformers 4.40, and the second tower of a mixture of
features has no config at all. Code that hub releases bring along is not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tinyllava_fast.data.images import pixel_shape
from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.models.architecture import LMMConfig, Values, VisionPart
from tinyllava_fast.models.checkpoints import _parts, _towers
from tinyllava_fast.models.checkpoints._base import LAYOUTS, Checkpoint, Folder, Layout, Sources
from tinyllava_fast.models.checkpoints._lora import CONFIG as ADAPTER
from tinyllava_fast.models.checkpoints._lora import NO_USE, read_lora
from tinyllava_fast.models.checkpoints._tensors import Stored, holds_weights, read_tensors
from tinyllava_fast.models.hf import legacy_text_config

PREFIXES = {"llm": "language_model.", "vision": "vision_tower._vision_tower.", "connector": "connector._connector."}
_SPLIT = {"llm": "language_model", "vision": "vision_tower", "connector": "connector"}


class FactoryLayout(Layout):
    """The common part of the three layouts: config.json."""

    def recognizes(self, folder: Folder) -> bool:
        """See the base class."""
        return folder.config.get("model_type") == "tinyllava" and self.laid_out(folder)

    def laid_out(self, folder: Folder) -> bool:
        """Return whether the weights are where this layout has them."""
        raise NotImplementedError

    def describe(self, folder: Folder, sources: Sources, tensors: Mapping[str, Mapping[str, Stored]]) -> Checkpoint:
        """Return the model of a config.json. tensors: of each component, under its own names."""
        config, where = folder.config, str(folder.path / "config.json")
        processors = [
            str(folder.path),
            sources.vision,
            (config.get("vision_config") or {}).get("model_name_or_path"),
        ]
        vision = _vision(config, sources, processors, where)
        connector = _parts.connector_part(_parts.need_text(config, "connector_type", where), config, where)
        tower, left_out = _parts.vision_weights(vision.type, tensors["vision"])
        adapting, dropped = _parts.connector_weights(connector.type, tensors["connector"])
        text = legacy_text_config(_parts.need_section(config, "text_config", where), where)
        origin = {
            "llm": config.get("llm_model_name_or_path"),
            "tokenizer": config.get("tokenizer_name_or_path") or config.get("llm_model_name_or_path"),
            "vision": config.get("vision_model_name_or_path"),
            "vision2": config.get("vision_model_name_or_path2"),
        }
        return Checkpoint(
            layout=self.name,
            config=LMMConfig(
                llm=_parts.llm_part(text),
                vision=vision,
                connector=connector,
                image_mode=_parts.image_mode(config, where),
                origin={k: str(v) for k, v in origin.items() if v},
            ),
            weights={**_parts.llm_weights(tensors["llm"]), **tower, **adapting},
            ignored=[*left_out, *dropped],
            tokenizer=_parts.tokenizer_source(folder, sources.llm or origin["tokenizer"], where),
            processor_sources=processors,
        )


@LAYOUTS.register("factory")
class Finetuned(FactoryLayout):
    """model.safetensors, whole or in shards, with every component under its prefix."""

    name = "factory"
    holds = "TinyLLaVA Factory's finetune output and hub releases: config.json (tinyllava), model.safetensors"

    def laid_out(self, folder: Folder) -> bool:
        """See the base class."""
        return holds_weights(folder.path)

    def open(self, folder: Folder, sources: Sources) -> Checkpoint:
        """See the base class."""
        tensors = folder.tensors()
        checkpoint = self.describe(folder, sources, {c: _parts.under(p, tensors) for c, p in PREFIXES.items()})
        checkpoint.unknown = [k for k in tensors if not k.startswith(tuple(PREFIXES.values()))]
        return checkpoint


@LAYOUTS.register("factory_split")
class Pretrained(FactoryLayout):
    """language_model/, vision_tower/ and connector/, a file of weights in each."""

    name = "factory_split"
    holds = "TinyLLaVA Factory's pretrain output: language_model/, vision_tower/, connector/ with pytorch_model.bin"

    def laid_out(self, folder: Folder) -> bool:
        """See the base class."""
        return _is_split(folder) and not folder.has(ADAPTER)

    def open(self, folder: Folder, sources: Sources) -> Checkpoint:
        """See the base class."""
        return self.describe(folder, sources, _split_tensors(folder))


@LAYOUTS.register("factory_lora")
class Lora(FactoryLayout):
    """A split folder with an adapter of peft beside it; the language model there is the one before training."""

    name = "factory_lora"
    holds = "TinyLLaVA Factory's LoRA output: the pretrain layout and adapter_config.json, adapter_model.safetensors"

    def laid_out(self, folder: Folder) -> bool:
        """See the base class."""
        return _is_split(folder) and folder.has(ADAPTER)

    def open(self, folder: Folder, sources: Sources) -> Checkpoint:
        """See the base class."""
        tensors = {
            component: {name.replace(".base_layer.", "."): stored for name, stored in found.items()}
            for component, found in _split_tensors(folder).items()
        }
        if any(not stored.dtype.is_floating_point for stored in tensors["llm"].values()):
            tensors["llm"] = _unquantized(folder, sources)
        checkpoint = self.describe(folder, sources, tensors)
        vision = checkpoint.config.vision
        ours = {stored.key.replace(".base_layer.", "."): name for name, stored in checkpoint.weights.items()}

        def rename(name: str) -> str | None:
            for component, prefix in PREFIXES.items():
                if name.startswith(prefix):
                    number = _towers.layer_number(name) if component == "vision" else None
                    single = vision.type != "mof"  # the layers of two towers are counted apart
                    if single and number is not None and number >= vision.config["num_hidden_layers"]:
                        return NO_USE
                    inner = "_connector." if component == "connector" else ""
                    return ours.get(inner + name.removeprefix(prefix))
            return None

        checkpoint.adapter = read_lora(folder.path, rename)
        return checkpoint


def _is_split(folder: Folder) -> bool:
    return not holds_weights(folder.path) and all(holds_weights(folder.path / name) for name in _SPLIT.values())


def _unquantized(folder: Folder, sources: Sources) -> dict[str, Stored]:
    """The language model of a QLoRA folder: int8 without scales there, but it was frozen, so its own folder has it."""
    name = sources.llm or folder.config.get("llm_model_name_or_path")
    if not name or not holds_weights(Path(name)):
        raise CheckpointError(
            f"{folder.path}: language_model/ is quantized and its scales are not stored; the language model that it "
            f"was made from, {name!r}, is no folder with weights; give that folder: --llm FOLDER"
        )
    return read_tensors(Path(name))


def _split_tensors(folder: Folder) -> dict[str, dict[str, Stored]]:
    found = {component: folder.tensors(name) for component, name in _SPLIT.items()}
    found["connector"] = {k.removeprefix("_connector."): v for k, v in found["connector"].items()}
    return found


def _vision(config: Values, sources: Sources, processors: list[str | None], where: str) -> VisionPart:
    """Return the tower, or the two towers of a mixture, that config.json describes.

    DINOv2's position table is resized as transformers 4.40 did. The size of its images is only in its image processor,
    whose crop is 224 in every release.
    """
    layer = config.get("vision_feature_layer", -2)
    stored = _towers.legacy_vision_config(_parts.need_section(config, "vision_config", where), where)
    first = _towers.truncated(stored, layer, where)
    vision = VisionPart(
        type=_towers.tower_type(first, where),
        config=first,
        feature_select=config.get("vision_feature_select_strategy", "patch"),
    )
    if str(config.get("vision_model_name_or_path")).partition(":")[0] == "mof":
        name = _parts.need_text(config, "vision_model_name_or_path2", where).rpartition(":")[2]
        second = _towers.truncated(_towers.tower_config(name, sources.vision2, where, "--vision2"), layer, where)
        half = {"config": second, "interpolation": "transformers4"}
        return replace(vision, type="mof", options={"dinov2": half})
    if vision.type == "dinov2":
        processor = _parts.stored_processor("dinov2", processors)
        side = pixel_shape(processor)[1] if processor else 224
        return replace(vision, options={"image_size": side, "interpolation": "transformers4"})
    return vision
