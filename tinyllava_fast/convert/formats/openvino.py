"""OpenVINO: a folder for openvino-genai's VLMPipeline, with four graphs and two for the tokenizer.

The pipeline prepares pictures as LLaVA-1.5 does: the short side is resized, the long one cropped. What differs there
is warned of. Any tower and connector can be traced; language models with windows of attention are refused, since the
paged attention that the pipeline puts into the graph does not see a window in it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch

from tinyllava_fast.convert.formats._base import FORMATS, Format, Model
from tinyllava_fast.convert.formats._graph_folder import known_tokens, one_text, write_settings
from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log
from tinyllava_fast.models.graphs import EmbeddingGraph, VisionGraph, check_graph

_NEEDED = ("openvino", "openvino_tokenizers", "nncf")


@FORMATS.register("openvino")
class OpenVinoFormat(Format):
    """Any tower and connector; language models whose K and V can be a graph's states, without windows of attention."""

    name = "openvino"
    weights: ClassVar[tuple[str, ...]] = ("int8", "int4")

    def write(self, model: Model, folder: Path) -> None:
        """See the base class."""
        lmm = model.lmm
        _check_windows(model)
        text = one_text(model)
        half = lmm.dtype != torch.float32
        lmm.float()
        check_graph(lmm, self.name)
        if missing := [name for name in _NEEDED if find_spec(name) is None]:
            raise UserError(f"--format openvino: needs {', '.join(missing)}; pip install 'tinyllava-fast[exports]'")
        from tinyllava_fast.convert.engines.openvino_ir import decoder, save, traced, write_tokenizer

        write_settings(model, text, folder)
        write_tokenizer(text, folder)
        _say_pixels(model)
        side = lmm.image_size
        pixels, ids = torch.zeros(2, 3, side, side), torch.zeros(2, 3, dtype=torch.int64)
        images = traced(VisionGraph(lmm), [pixels], [(-1, 3, side, side)], ["pixel_values", "last_hidden_state"])
        rows = max(text.image_token + 1, known_tokens(model))
        embedding = traced(EmbeddingGraph(lmm, rows), [ids], [(-1, -1)], ["input", "inputs_embeds"])
        first = "int8" if model.weights else None  # as optimum has it: four bits are for the decoder alone
        save(images, folder / "openvino_vision_embeddings_model.xml", weights=first, half=half)
        save(embedding, folder / "openvino_text_embeddings_model.xml", weights=first, half=half)
        language = decoder(lmm, known_tokens(model))
        save(language, folder / "openvino_language_model.xml", weights=model.weights, half=half)


def _check_windows(model: Model) -> None:
    config = model.lmm.llm.config
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        raise UserError(f"llm.config.sliding_window: {window}; OpenVINO's paged attention would not keep to it")


def _say_pixels(model: Model) -> None:
    """Warn of pictures that the pipeline prepares otherwise."""
    settings = vars(model.processor)
    if model.lmm.config.image_mode == "pad" or not settings.get("do_center_crop"):
        done = "padded" if model.lmm.config.image_mode == "pad" else "squashed"
        log.warning(
            "image_mode: %s; openvino-genai crops a picture that is not square where this model's training %s it: "
            "send square ones",
            model.lmm.config.image_mode,
            done,
        )
