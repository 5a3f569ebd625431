"""Modules of torch as ONNX files, with int8 weights where they are asked for."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn
from torch.export import Dim, export

from tinyllava_fast.models.graphs import plain

OPSET = 20
_QUANTIZED = ["MatMul", "Gemm", "Gather"]
"""Of int8 files. A tower's convolution stays as it is: onnxruntime's of int8 is slower."""
Varying = Sequence[int]
"""The dimensions of an input whose sizes vary."""


def write_graph(
    module: nn.Module,
    inputs: Sequence[Tensor],
    varying: Sequence[Varying],
    names: tuple[Sequence[str], Sequence[str]],
    path: Path,
    *,
    variadic: int = 0,
    weights: str | None = None,
) -> None:
    """Trace a module into an ONNX file; weights past the 2 GB of a file lie beside it.

    names: of the inputs and of the outputs. variadic: how many of the last inputs are one ``*argument``.
    """
    fixed = len(inputs) - variadic
    shapes = [dict.fromkeys(dimensions, Dim.DYNAMIC) for dimensions in varying]
    dynamic = (*shapes[:fixed], tuple(shapes[fixed:])) if variadic else tuple(shapes)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with plain(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = export(module, tuple(inputs), dynamic_shapes=dynamic)
        program = torch.onnx.export(
            exported, (), input_names=list(names[0]), output_names=list(names[1]), opset_version=OPSET, verbose=False
        )
    assert program is not None  # noqa: S101 it has no file to write to
    whole = path if weights is None else path.with_suffix(".float.onnx")
    program.save(str(whole))
    if weights is None:
        return
    quantize_dynamic(
        whole, path, op_types_to_quantize=_QUANTIZED, weight_type=QuantType.QInt8, per_channel=True,
        use_external_data_format=_is_large(whole),
    )  # fmt: skip
    for file in (whole, whole.with_name(whole.name + ".data")):
        file.unlink(missing_ok=True)


def _is_large(path: Path) -> bool:
    data = path.with_name(path.name + ".data")
    return data.exists() and data.stat().st_size // 4 > onnx.checker.MAXIMUM_PROTOBUF // 2
