"""ONNX: three graphs under the names of optimum and transformers.js, and what a program without torch needs.

docs/examples/onnx_answer.py runs them with onnxruntime, numpy, tokenizers and Pillow.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch

from tinyllava_fast.convert.formats._base import FORMATS, Format, Model
from tinyllava_fast.convert.formats._graph_folder import known_tokens, one_text, write_settings
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.graphs import (
    DecoderGraph,
    EmbeddingGraph,
    VisionGraph,
    check_graph,
    input_names,
    output_names,
)

FOLDER = "onnx"
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


@FORMATS.register("onnx")
class OnnxFormat(Format):
    """Any tower and connector; language models whose K and V can be a graph's inputs. Floats are float32."""

    name = "onnx"
    weights: ClassVar[tuple[str, ...]] = ("int8",)

    def write(self, model: Model, folder: Path) -> None:
        """See the base class."""
        lmm = model.lmm.float()
        text = one_text(model)
        check_graph(lmm, self.name)
        if missing := [name for name in _NEEDED if find_spec(name) is None]:
            raise UserError(f"--format onnx: needs {', '.join(missing)}; pip install 'tinyllava-fast[exports]'")
        from tinyllava_fast.convert.engines.onnx_graph import write_graph

        write_settings(model, text, folder)
        graphs = folder / FOLDER
        graphs.mkdir()
        side, known = lmm.image_size, known_tokens(model)
        write_graph(
            VisionGraph(lmm),
            [torch.zeros(2, 3, side, side)],
            [(0,)],
            (["pixel_values"], ["image_features"]),
            graphs / "vision_encoder.onnx",
            weights=model.weights,
        )
        write_graph(
            EmbeddingGraph(lmm, max(text.image_token + 1, known)),
            [torch.zeros(2, 3, dtype=torch.int64)],
            [(0, 1)],
            (["input_ids"], ["inputs_embeds"]),
            graphs / "embed_tokens.onnx",
            weights=model.weights,
        )
        decoder = DecoderGraph(lmm, known)
        past = decoder.no_past(2, 3)
        write_graph(
            decoder,
            [torch.zeros(2, 4, lmm.hidden_size), torch.ones(2, 7).long(), torch.zeros(2, 4).long(), *past],
            [(0, 1)] * 3 + [(0, 2)] * len(past),
            (input_names(lmm), output_names(lmm)),
            graphs / "decoder_model_merged.onnx",
            variadic=len(past),
            weights=model.weights,
        )
