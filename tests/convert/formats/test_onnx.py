"""ONNX folders answer as the model does here, run by the example of the documentation, which knows no torch."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.convert.formats.exported import QUESTION, STEPS, export, family, pictures
from tinyllava_fast.errors import UserError

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "onnx_answer.py"


@pytest.mark.exports
@pytest.mark.parametrize(
    ("name", "vision", "mode"),
    [("tinyllama", "siglip", "pad"), ("qwen2", "clip", "square"), ("openelm", "siglip", "square")],
)
def test_answers_are_the_models_own(name, vision, mode, tmp_path) -> None:
    """Pictures that are not square too; this Qwen2 has windows of attention."""
    pytest.importorskip("onnxruntime", reason="the extra 'exports' is not installed")
    pytest.importorskip("onnxscript", reason="the extra 'exports' is not installed")
    windows = {"use_sliding_window": True} if name == "qwen2" else {}
    exported = export(family(name, vision, **windows), tmp_path, "onnx", mode)
    answer, answers = runpy.run_path(str(EXAMPLE))["answer"], []
    images = pictures((32, 32), (48, 60))
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    for count in range(3):
        answers.append(exported.answer(images[:count]))
        assert answer(exported.theirs, QUESTION, paths[:count], STEPS)[0] == answers[-1]
    assert len({tuple(found) for found in answers}) > 1


@pytest.mark.exports
def test_int8_is_smaller_and_the_example_is_a_program_without_torch(tmp_path) -> None:
    onnx = pytest.importorskip("onnx", reason="the extra 'exports' is not installed")
    pytest.importorskip("onnxscript", reason="the extra 'exports' is not installed")
    exported = export(family("tinyllama"), tmp_path, "onnx", weights="int8")
    model = onnx.load(exported.theirs / "onnx" / "decoder_model_merged.onnx")
    assert {node.op_type for node in model.graph.node} >= {"MatMulInteger", "DynamicQuantizeLinear"}
    assert not list((exported.theirs / "onnx").glob("*.float.onnx*"))
    code = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    ran = subprocess.run(
        [sys.executable, "-c", code, exported.theirs, QUESTION], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0 and ran.stdout.strip(), ran.stderr


def test_the_example_is_short_and_what_a_graph_lacks_is_refused_by_name(tmp_path) -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 60
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "rope_theta": 1e4}
    rope["original_max_position_embeddings"] = 1024
    with pytest.raises(UserError, match="rope_type: longrope"):
        export(family("tinyllama", rope_parameters=rope), tmp_path, "onnx")
