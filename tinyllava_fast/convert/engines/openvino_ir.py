"""Modules of torch as OpenVINO's graphs: traced, with K and V as states, weights compressed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import nncf
import openvino as ov
import openvino_tokenizers
import torch
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation
from torch import Tensor, nn

from tinyllava_fast.convert.formats._graph_folder import OneText
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.graphs import DecoderGraph, input_names, output_names, plain
from tinyllava_fast.models.lmm import LMM

Shape = Sequence[int]
"""-1: any number."""

_INT4 = {"mode": nncf.CompressWeightsMode.INT4_ASYM, "group_size": 64, "ratio": 1.0}
_INT8 = {"mode": nncf.CompressWeightsMode.INT8_ASYM}
_COMPRESSIONS = {"int8": _INT8, "int4": _INT4}


def traced(module: nn.Module, examples: Sequence[Tensor], shapes: Sequence[Shape], names: Sequence[str]) -> ov.Model:
    """Return the graph of a module. shapes: of its inputs; names: of its inputs, then its outputs."""
    with plain():
        model = ov.convert_model(module, example_input=tuple(examples))
    ports = [*model.inputs, *model.outputs]
    assert len(ports) == len(names), [port.any_name for port in ports]  # noqa: S101 our own modules
    for port, name in zip(ports, names, strict=True):
        port.get_tensor().set_names({name})
    for port, shape in zip(model.inputs, shapes, strict=True):
        port.get_node().set_partial_shape(ov.PartialShape(list(shape)))
        port.get_node().set_friendly_name(port.any_name)
    model.validate_nodes_and_infer_types()
    return model


def decoder(lmm: LMM, known: int) -> ov.Model:
    """Return the decoder whose K and V are states, which ``beam_idx`` [B] reorders."""
    graph = DecoderGraph(lmm, known)
    width, past = lmm.hidden_size, graph.no_past(2, 3)
    examples = [torch.zeros(2, 4, width), torch.ones(2, 7, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)]
    shapes = [(-1, -1, width), (-1, -1), (-1, -1), *((-1, tensor.shape[1], -1, tensor.shape[3]) for tensor in past)]
    inputs, outputs = input_names(lmm), output_names(lmm)
    model = traced(graph, [*examples, *past], shapes, [*inputs, *outputs])
    _reorder(model, inputs[3:])
    apply_make_stateful_transformation(model, dict(zip(inputs[3:], outputs[1:], strict=True)))
    _start_empty(model)
    return model


def _reorder(model: ov.Model, past: Sequence[str]) -> None:
    """Let each K and V of the past be taken in the order of ``beam_idx``."""
    beams = ops.parameter([-1], ov.Type.i32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([beams])
    for name in past:
        port = model.input(name)
        readers = list(port.get_target_inputs())
        chosen = ops.gather(port, beams, ops.constant(0, dtype="int64"))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()


def _start_empty(model: ov.Model) -> None:
    """Let states begin without a token, for as many sequences as ``inputs_embeds`` has."""
    rows = ops.shape_of(model.input("inputs_embeds"), output_type="i64")
    batch = ops.gather(rows, ops.constant([0], dtype="int64"), ops.constant(0, dtype="int64"))
    for node in model.get_ops():
        if node.get_type_name() != "ReadValue":
            continue
        _, heads, _, size = node.get_output_partial_shape(0)
        sizes = [
            batch,
            *(ops.constant([number], dtype="int64") for number in (heads.get_length(), 0, size.get_length())),
        ]
        zero = ops.constant(0.0, dtype=node.get_output_element_type(0).to_dtype())
        node.set_arguments([ops.broadcast(zero, ops.concat(sizes, axis=0))])
    model.validate_nodes_and_infer_types()


def save(model: ov.Model, path: Path, *, weights: str | None, half: bool) -> None:
    """Write NAME.xml and NAME.bin. weights: int8, int4 or None; half: what is left in floats is stored as float16."""
    if weights is not None:
        nncf.set_log_level(logging.ERROR)
        model = nncf.compress_weights(model, **_COMPRESSIONS[weights])
    ov.save_model(model, path, compress_to_fp16=half)


def write_tokenizer(text: OneText, folder: Path) -> None:
    """Write OpenVINO's form of a tokenizer. Raises UserError if it does not cut texts as the tokenizer does."""
    try:
        models = openvino_tokenizers.convert_tokenizer(text.tokenizer, with_detokenizer=True)
    except Exception as error:
        raise UserError(f"tokenizer: OpenVINO cannot hold this one: {error}") from error
    cut, joined = models
    whole = ov.Core().compile_model(
        openvino_tokenizers.convert_tokenizer(text.tokenizer, add_special_tokens=False), "CPU"
    )
    if not text.agrees(lambda prompt: whole([prompt])["input_ids"][0].tolist()):
        raise UserError(
            "tokenizer: OpenVINO's form of it cuts prompts into other tokens than this model was trained on"
        )
    ov.save_model(cut, folder / "openvino_tokenizer.xml")
    ov.save_model(joined, folder / "openvino_detokenizer.xml")
