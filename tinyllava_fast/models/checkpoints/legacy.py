"""Folders with LLaVA's own key names: TinyLLaVABench's releases and LLaVA-1.5.

config.json is the language model's, with the keys of the multimodal parts added; the tower is named, not described.
Folders that hold only what a stage trained (a projector, an adapter) are in legacy_parts.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.models.architecture import LMMConfig, VisionPart
from tinyllava_fast.models.checkpoints import _parts, _towers
from tinyllava_fast.models.checkpoints._base import LAYOUTS, Checkpoint, Folder, Layout, Sources
from tinyllava_fast.models.checkpoints._tensors import Stored, holds_weights
from tinyllava_fast.models.hf import legacy_text_config

TOWER, PROJECTOR = "model.vision_tower.vision_tower.", "model.mm_projector."
# model_type of config.json -> transformers type of its language model.
BENCH = {"tiny_llava_phi": "phi", "tiny_llava_stablelm": "stablelm", "tiny_llava": "llama"}
LLAVA = {"llava_llama": "llama", "llava": "llama"}


class LegacyLayout(Layout):
    """The common part of both layouts: config.json and the names of tensors."""

    text_types: Mapping[str, str]

    def recognizes(self, folder: Folder) -> bool:
        """See the base class. transformers' own folders have model_type llava too, but a nested text_config."""
        config = folder.config
        known = config.get("model_type") in self.text_types and "text_config" not in config
        return known and "mm_vision_tower" in config and holds_weights(folder.path)

    def open(self, folder: Folder, sources: Sources) -> Checkpoint:
        """See the base class."""
        return self.describe(folder, sources, folder.tensors())

    def selection(self, tower: str, config: Mapping[str, object]) -> str:
        """Return our name for the tower's tokens that are kept."""
        return str(config.get("mm_vision_select_feature") or "patch")

    def describe(self, folder: Folder, sources: Sources, tensors: Mapping[str, Stored]) -> Checkpoint:
        """Return the model of a config.json and all tensors under LLaVA's names."""
        config, where = folder.config, str(folder.path / "config.json")
        for key in ("mm_use_im_start_end", "mm_use_im_patch_token"):
            if config.get(key):
                raise CheckpointError(f"{where}: {key} is true: prompts with tokens around the image are not supported")
        projector = str(config.get("mm_projector_type") or "linear")
        if projector in ("resampler", "qformer"):
            raise CheckpointError(f"{where}: TinyLLaVABench's {projector} is another one than TinyLLaVA Factory's")
        name = _parts.need_text(config, "mm_vision_tower", where)
        layer = int(config.get("mm_vision_select_layer", -2))
        full = _towers.tower_config(name, sources.vision, where, "--vision")
        kind = _towers.tower_type(full, where)
        select = self.selection(kind, config)
        vision = VisionPart(type=kind, config=_towers.truncated(full, layer, where), feature_select=select)
        connector = _parts.connector_part(projector, config, where)
        stored = _parts.under(TOWER, tensors)
        if not stored:
            stored = _towers.pretrained_tower(kind, name, sources.vision, where)
        tower, left_out = _parts.vision_weights(kind, stored)
        adapting, dropped = _parts.connector_weights(connector.type, _parts.under(PROJECTOR, tensors))
        llm = {k: v for k, v in tensors.items() if not k.startswith((TOWER, PROJECTOR))}
        text = legacy_text_config(config | {"model_type": self.text_types[config["model_type"]]}, where)
        return Checkpoint(
            layout=self.name,
            config=LMMConfig(
                llm=_parts.llm_part(text),
                vision=vision,
                connector=connector,
                image_mode=_parts.image_mode(config, where),
                origin={"vision": name},
            ),
            weights={**_parts.llm_weights(llm), **tower, **adapting},
            ignored=[*left_out, *dropped],
            tokenizer=_parts.tokenizer_source(folder, sources.llm, where),
            processor_sources=[str(folder.path), sources.vision, name],
        )


@LAYOUTS.register("tinyllava_bench")
class Bench(LegacyLayout):
    """TinyLLaVABench: its SigLIP towers kept every token, whatever config.json says, and their last layer is gone."""

    name = "tinyllava_bench"
    holds = "TinyLLaVABench: config.json (tiny_llava_phi, tiny_llava_stablelm, tiny_llava) with mm_vision_tower"
    text_types = BENCH

    def selection(self, tower: str, config: Mapping[str, object]) -> str:
        """See the base class."""
        return "cls_patch" if tower.startswith("siglip") else super().selection(tower, config)


@LAYOUTS.register("llava15")
class Llava15(LegacyLayout):
    """LLaVA-1.5: weights of the tower may be absent and then come from the tower's own folder."""

    name = "llava15"
    holds = "LLaVA-1.5: config.json (llava_llama) with mm_vision_tower, the tower inside or in its own folder"
    text_types = LLAVA
