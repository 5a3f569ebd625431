"""Fixtures around the tiny model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny import make_engine, make_model, make_tokenizer, tiny_config
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.log import log
from tinyllava_fast.models.build import build_image_processor
from tinyllava_fast.models.io import save_model
from tinyllava_fast.models.lmm import LMM


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the package logs."""
    log.addHandler(caplog.handler)
    yield caplog
    log.removeHandler(caplog.handler)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def lmm() -> LMM:
    return make_model()


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8)) for i in range(4)]


@pytest.fixture
def engine(lmm: LMM, tokenizer: PreTrainedTokenizerFast) -> Engine:
    return make_engine(lmm, tokenizer)


@pytest.fixture(scope="session")
def folder(lmm: LMM, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a saved model folder."""
    path = tmp_path_factory.mktemp("model") / "final"
    save_model(lmm, tokenizer, build_image_processor(tiny_config()), path)
    return path


@pytest.fixture(scope="session")
def plain(lmm: LMM) -> PreTrainedModel:
    """The same language model as stock transformers runs it: sdpa, its own cache."""
    config = copy.deepcopy(lmm.llm.config)
    config._attn_implementation = "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    model.load_state_dict(lmm.llm.state_dict())
    return model
