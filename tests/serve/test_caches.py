"""What is kept between requests never answers another one: pictures, beginnings of prompts, models, clients."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.serve.conftest import Running, data_uri, image_part, saved, text_part
from tests.tiny import make_engine, make_model, make_tokenizer, tiny_config
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.types import IMAGE, Request, Sampling
from tinyllava_fast.models.build import build_image_processor
from tinyllava_fast.models.io import save_model

NOISE = np.random.default_rng(7).integers(0, 256, 24 * 32 * 3, dtype=np.uint8)


@pytest.fixture(scope="module")
def engines(engine: Engine) -> dict[str, Engine]:
    """Engines that keep nothing: what the models of the server must answer."""
    return {"tiny": engine, "other": make_engine(make_model(seed=3), make_tokenizer())}


@pytest.fixture(scope="module")
def server(start: Callable[..., Running], folder: Path, media: Path, tmp_path_factory: Any) -> Running:
    other = tmp_path_factory.mktemp("other") / "final"
    save_model(make_model(seed=3), make_tokenizer(), build_image_processor(tiny_config()), other)
    return start("--models", f"tiny={folder}", f"other={other}", "--media-path", str(media))


@pytest.fixture(scope="module")
def right(engines: dict[str, Engine]) -> Callable[..., str]:
    def answered(images: Sequence[Image.Image], text: str = "what?", model: str = "tiny") -> str:
        value = [part for _ in images for part in (IMAGE, "\n")] + [text]
        sampling = Sampling(max_new_tokens=8)
        request = Request(messages=[{"from": "human", "value": value}], image=list(images) or None, sampling=sampling)
        return engines[model].answers([request])[0].text

    return answered


def ask(server: Running, urls: Sequence[str], text: str = "what?", model: str = "tiny") -> tuple[str, dict[str, Any]]:
    """The answer, and what was used."""
    status, body, _ = server.chat([*map(image_part, urls), text_part(text)], model=model, max_tokens=8)
    assert status == 200, body
    return body["choices"][0]["message"]["content"], body["usage"]


def uri(image: Image.Image, kind: str = "PNG") -> str:
    return data_uri(saved(image, kind), kind.lower())


def encoded(server: Running) -> float:
    return server.metric("tlf_images_encoded_total")


def test_equal_bytes_of_another_size_or_mode_are_another_picture(server, right):
    images = [
        Image.frombytes("RGB", (24, 32), NOISE.tobytes()),
        Image.frombytes("RGB", (32, 24), NOISE.tobytes()),
        Image.frombytes("L", (24, 96), NOISE.tobytes()),
        Image.frombytes("L", (48, 48), NOISE.tobytes()),
        Image.frombytes("CMYK", (24, 24), NOISE.tobytes()),
    ]
    before, expected = encoded(server), [right([image]) for image in images]
    for _ in range(2):
        kinds = ["TIFF" if image.mode == "CMYK" else "PNG" for image in images]
        found = [ask(server, [uri(image, kind)])[0] for image, kind in zip(images, kinds, strict=True)]
        assert found == expected
    assert len(set(expected)) > 2 and encoded(server) == before + len(images)


def test_a_picture_is_one_under_all_its_names(server, media, right, pictures):
    (media / "named.png").write_bytes(saved(pictures[0]))
    (media / "again.bmp").write_bytes(saved(pictures[0], "BMP"))
    before = encoded(server)
    for url in (uri(pictures[0]), uri(pictures[0], "BMP"), f"file://{media}/named.png", f"file://{media}/again.bmp"):
        assert ask(server, [url], "which?")[0] == right(pictures[:1], "which?")
    assert encoded(server) == before + 1
    (media / "named.png").write_bytes(saved(pictures[1]))  # a name may stand for something else tomorrow
    assert ask(server, [f"file://{media}/named.png"], "which?")[0] == right(pictures[1:2], "which?")


def of_model(server: Running, name: str, model: str) -> float:
    text = server.ask("GET", "/metrics")[1].decode()
    (found,) = re.findall(rf'^{name}{{model="{model}"}} (\S+)$', text, re.M)
    return float(found)


def test_models_share_nothing(server, right, pictures):
    before = {model: of_model(server, "tlf_images_encoded_total", model) for model in ("tiny", "other")}
    for model in ("tiny", "other", "tiny", "other"):
        assert ask(server, [uri(pictures[2])], model=model)[0] == right(pictures[2:], model=model)
    assert right(pictures[2:], model="tiny") != right(pictures[2:], model="other")
    for model, count in before.items():
        assert of_model(server, "tlf_images_encoded_total", model) == count + 1


def test_a_beginning_ends_where_a_picture_differs(server, right):
    pixels = NOISE.reshape(32, 24, 3).copy()
    one = Image.fromarray(pixels)
    pixels[-1, -1] ^= 255
    other = Image.fromarray(pixels)
    text = "what is it, " * 5
    first = ask(server, [uri(one)], text)[1]
    answer, usage = ask(server, [uri(other)], text)
    assert answer == right([other], text)
    reused = usage["prompt_tokens_details"]["cached_tokens"]
    assert reused < first["prompt_tokens"] - len(text)
    assert ask(server, [uri(one)], text)[1]["prompt_tokens_details"]["cached_tokens"] == first["prompt_tokens"] - 1
    for images in ([one, other], [other, one], [one, one], [other]):  # begin as one of them did
        assert ask(server, [uri(image) for image in images], text)[0] == right(images, text)


def test_clients_that_ask_at_once_get_their_own_answers(server, right):
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)) for _ in range(12)]
    with ThreadPoolExecutor(12) as clients:
        for _ in range(2):
            found = list(clients.map(lambda image: ask(server, [uri(image)])[0], images))
            assert found == [right([image]) for image in images]
