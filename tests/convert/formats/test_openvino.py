"""OpenVINO folders answer in openvino-genai's VLMPipeline, in float32, with paged attention, as the model does here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.convert.formats.exported import QUESTION, STEPS, export, family, pictures
from tests.vectors import GOLDEN
from tinyllava_fast.data.tokenizer import load_tokenizer
from tinyllava_fast.errors import UserError

FAMILIES = ["auto", "gemma", "openelm", "phi", "qwen2", "qwen3", "smollm2", "stablelm", "tinyllama"]
NEEDED = ("nncf", "openvino_genai")


def pipeline(folder: Path, backend: str = "PA") -> Any:
    genai = pytest.importorskip("openvino_genai", reason="the extra 'exports' is not installed")
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    return genai.VLMPipeline(str(folder), "CPU", ATTENTION_BACKEND=backend, **exact)


def theirs(pipe: Any, images: list[Image.Image]) -> list[int]:
    import openvino
    import openvino_genai

    class Tokens(openvino_genai.StreamerBase):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[int] = []

        def write(self, token: int | list[int]) -> Any:
            self.found += token if isinstance(token, list) else [token]
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    settings, tokens = pipe.get_generation_config(), Tokens()
    settings.max_new_tokens = STEPS
    arrays = [openvino.Tensor(np.asarray(image)[None]) for image in images]
    pipe.generate(QUESTION, images=arrays, generation_config=settings, streamer=tokens)
    return tokens.found


@pytest.mark.exports
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_the_models_own(name, tmp_path) -> None:
    for package in NEEDED:
        pytest.importorskip(package, reason="the extra 'exports' is not installed")
    exported = export(family(name), tmp_path, "openvino")
    pipe, answers = pipeline(exported.theirs), []
    for images in ([], pictures((32, 32)), pictures((32, 32), (48, 48))):
        answers.append(exported.answer(images))
        assert theirs(pipe, images) == answers[-1]
    assert len({tuple(answer) for answer in answers}) > 1


@pytest.mark.exports
@pytest.mark.parametrize(
    ("vision", "connector", "weights", "dtype"),
    [
        ("dinov2", "qformer", None, torch.bfloat16),
        ("clip", "pixel_shuffle", "int8", None),
        ("siglip", "resampler", "int4", None),
    ],
)
def test_any_tower_and_connector_and_weights(vision, connector, weights, dtype, tmp_path) -> None:
    """What is quantized answers something; what is rounded to float16 alone answers as the model in float32 does."""
    for package in NEEDED:
        pytest.importorskip(package, reason="the extra 'exports' is not installed")
    wide = {"hidden_size": 64, "intermediate_size": 128}
    exported = export(
        family("tinyllama", vision, connector, **wide), tmp_path, "openvino", weights=weights, dtype=dtype
    )
    [image] = pictures((32, 32))
    found = theirs(pipeline(exported.theirs, "SDPA"), [image])
    assert len(found) == STEPS or found[-1] == 2
    text = (exported.theirs / "openvino_language_model.xml").read_text()
    kind = {None: "f16", "int8": "u8", "int4": "u4"}[weights]
    assert f'element_type="{kind}"' in text


@pytest.mark.exports
@pytest.mark.parametrize("name", ["llama_spm", "gemma_spm", "phi_bytebpe", "qwen2_base_bytebpe", "stablelm_bytebpe"])
def test_tokenizers_of_the_field(name, tmp_path) -> None:
    """Each either cuts as ours does, or the export refuses it, naming the tokenizer."""
    for package in NEEDED:
        pytest.importorskip(package, reason="the extra 'exports' is not installed")
    from tests.convert.formats.test_graph_folder import TEMPLATE, text_of
    from tinyllava_fast.convert.engines.openvino_ir import write_tokenizer

    write_tokenizer(text_of(load_tokenizer(GOLDEN / "tokenizers" / name), TEMPLATE[name]), tmp_path)
    assert (tmp_path / "openvino_tokenizer.xml").is_file()


@pytest.mark.parametrize(
    ("config", "mode", "reason"),
    [
        (family("gemma2"), "square", "llm.config.sliding_window: 24"),
        (family("tinyllama"), "anyres", "image_mode: anyres"),
        (
            family("tinyllama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "square",
            "rope_type: dynamic",
        ),
    ],
)
def test_what_openvino_lacks_is_refused_by_name(config, mode, reason, tmp_path) -> None:
    with pytest.raises(UserError, match=reason):
        export(config, tmp_path, "openvino", mode)
    assert not (tmp_path / "theirs").exists()
