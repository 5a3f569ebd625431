"""A tiny model whose answers depend on prompt and pictures, saved, exported, and asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.convert.formats.test_gguf import TEXTS, describe, enlarged
from tests.infer.test_families import CHANGES, LARGER
from tests.models.llm.families import CONFIGS
from tinyllava_fast.config.schema import LLMConfig, ModelConfig
from tinyllava_fast.convert.convert import export_model
from tinyllava_fast.data.bpe import train_tokenizer
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.models import io
from tinyllava_fast.models.build import build_image_processor, build_model

QUESTION = "What is the blue shape?"
STEPS = 12


def family(name: str, vision: str = "siglip", connector: str = "mlp", **llm: object) -> ModelConfig:
    """The tiny model of a family; without windows of attention."""
    changes = CHANGES.get(name, {}) | ({"use_sliding_window": False} if name == "qwen2" else {}) | llm
    described = LLMConfig(type=name, config=CONFIGS[name] | LARGER | changes)
    return dataclasses.replace(describe(vision, connector), llm=described)


@dataclasses.dataclass
class Exported:
    """A model folder ``ours`` and its export ``theirs``."""

    ours: Path
    theirs: Path
    mode: str

    def answer(self, images: Sequence[Image.Image]) -> list[int]:
        """Our greedy tokens."""
        lmm, tokenizer, processor = io.load_model(self.ours)
        template = TEMPLATES.get(lmm.config.template)
        engine = Engine(lmm, tokenizer, processor, template, image_mode=self.mode, batch_tokens=512)  # type: ignore[arg-type]
        request = Request.ask(QUESTION, list(images) or None, sampling=Sampling(max_new_tokens=STEPS))
        return engine.answers([request])[0].tokens


def export(config: ModelConfig, folder: Path, format: str, mode: str = "square", **options: Any) -> Exported:
    """Save a model of the configuration with large weights and export it."""
    lmm, tokenizer = enlarged(build_model(config)), train_tokenizer(TEXTS, 268)
    tokenizer.chat_template = "the language model's own"
    lmm.config = dataclasses.replace(lmm.config, template="llama", image_mode=mode)
    io.save_model(lmm, tokenizer, build_image_processor(config), folder / "ours")
    export_model(folder / "ours", folder / "theirs", format, **options)
    return Exported(folder / "ours", folder / "theirs", mode)


def pictures(*shapes: tuple[int, int]) -> list[Image.Image]:
    """Seeded noise."""
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*shape, 3), np.uint8)) for shape in shapes]
