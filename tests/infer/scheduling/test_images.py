"""Images of every kind through the assistant: the same answer, or a sentence."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.assistant import Assistant
from tinyllava_fast.infer.scheduling.images import RecentFeatures


@pytest.fixture(scope="module")
def assistant(folder):
    return Assistant.from_pretrained(folder, device="cpu", batch_tokens=2048)


def test_one_picture_in_every_form_gives_one_answer(assistant, images, tmp_path):
    path = tmp_path / "a.png"
    images[1].save(path)
    expected = assistant.answer(path, "what is it?", max_new_tokens=8)
    for form in (str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), np.asarray(images[1]), images[1]):
        assert assistant.answer(form, "what is it?", max_new_tokens=8) == expected
    with path.open("rb") as file:
        assert assistant.answer([file], "what is it?", max_new_tokens=8) == expected
    sums = assistant.score(path, "what?", ["red", "blue"]).sums
    assert assistant.score(np.asarray(images[1]), "what?", ["red", "blue"]).sums == pytest.approx(sums)
    assert len(assistant.answer_many([(path.read_bytes(), "what?"), (None, "and?")], max_new_tokens=3)) == 2


@pytest.mark.parametrize(
    ("image", "question", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), "q", r"\[3, 8, 8\] is no picture"),
        (b"nothing", "q", "the image of 7 bytes: truncated or not an image"),
        ("https://host/cat.png", "q", "https://host/cat.png: a URL; pictures are not downloaded"),
        (Image.new("RGB", (0, 0)), "q", "a picture of 0 x 0 pixels shows nothing"),
        (Image.new("F", (8, 8)), "q", "floating-point numbers"),
        (3.5, "q", "the image: got float"),
        (None, None, "the question: expected a text, got NoneType"),
        (None, 7, "the question: expected a text, got int"),
    ],
)
def test_a_short_sentence_for_each(assistant, image, question, message):
    with pytest.raises(UserError, match=message) as error:
        assistant.answer(image, question, max_new_tokens=2)
    assert len(str(error.value)) < 250
    assert assistant.answer(None, "still there?", max_new_tokens=1) is not None


def test_what_is_no_pair_and_markers_without_pictures(assistant):
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(UserError, match=r"questions, item 1: expected an \(image, question\) pair, got 'why\?'"):
        assistant.answer_many([(picture, "why?"), "why?"])
    with pytest.raises(UserError, match="its text holds 2 <image> but it has one image"):
        assistant.answer(picture, "<image> and <image>: which?")
    assert isinstance(assistant.answer([picture, picture], "<image> and <image>: which?", max_new_tokens=2), str)


def test_features_are_kept_in_memory_that_is_taken_once():
    cache = RecentFeatures(10 * 3 * 4)  # ten rows of three float32
    cache.take_memory(torch.empty(0, 3))
    memory = cache._held.data_ptr()
    with torch.inference_mode():  # as a step of the engine
        for number in range(5):
            cache.put(bytes([number]), torch.full((4, 3), float(number)))
    assert len(cache) == 2 and cache.get(b"\x02") is None
    oldest = cache.get(b"\x03")
    assert oldest is not None and oldest.eq(3).all()
    cache.put(b"another", torch.full((4, 3), 9.0))  # takes the place of 4, for 3 was used after it
    assert cache.get(b"\x04") is None and cache.get(b"\x03") is not None
    cache.put(b"two", torch.full((6, 3), 7.0))
    assert len(cache) == 1 and oldest.eq(3).all()  # what was handed out is nobody else's
    cache.put(b"too large", torch.zeros(11, 3))
    cache.put(b"two", torch.zeros(6, 3))
    kept = cache.get(b"two")
    assert len(cache) == 1 and kept is not None and kept.eq(7).all() and cache._held.data_ptr() == memory


def test_a_cache_for_nothing_keeps_nothing():
    cache = RecentFeatures(0)
    cache.put(b"a", torch.ones(2, 3))
    assert len(cache) == 0 and cache.get(b"a") is None
