"""What a model is trained to say, at the positions it is trained at, is what the engine makes it say."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import make_engine
from tinyllava_fast.data.collate import collate
from tinyllava_fast.data.images import to_pixels
from tinyllava_fast.infer.types import Request, Sampling

TURNS = [("<image>\nwhat is it?", "a cat"), ("why so?", "it is furry"), ("is it red?", "no")]


@torch.no_grad()
def trained_predictions(engine, image, turns: str) -> list[list[int]]:
    """Greedy ids at the supervised positions of each turn of a packed training sample (teacher forcing)."""
    lmm, template = engine.lmm, engine.template
    sample = template.encode([TURNS], engine.tokenizer, turns=turns)[0]
    pixels = to_pixels([image], engine.processor)
    batch = collate([sample], pixels, tokens=1024, max_segments=8, tokens_per_image=lmm.tokens_per_image)
    features = lmm.encode_images(batch.pixel_values).flatten(0, 1)
    embeds = lmm.embed(batch.input_ids, features, batch.image_slots)
    hidden = lmm.decode(embeds, batch.position_ids, cu_seqlens=batch.cu_seqlens, prefix=batch.prefix)
    where = batch.supervised[: batch.num_supervised]
    best = lmm.logits(hidden[where])[:, : engine.vocab].argmax(-1).tolist()
    answers: list[list[int]] = [[]]
    for token, label in zip(best, batch.labels[where].tolist(), strict=True):
        answers[-1].append(token)
        if label == 2:  # </s> ends a turn
            answers.append([])
    return answers[:-1]


@pytest.mark.parametrize("turns", ["conversation", "independent"])
def test_first_token_of_each_answer(lmm, tokenizer, images, turns):
    engine = make_engine(lmm, tokenizer)
    expected = trained_predictions(engine, images[0], turns)
    messages = []
    requests = []
    for question, answer in TURNS:
        if turns == "independent":
            messages = []
        messages = [*messages, {"from": "human", "value": question}]
        # The first predicted token follows the question; a supervised answer begins with the space before it.
        requests.append(Request(messages=list(messages), image=images[0], sampling=Sampling(max_new_tokens=1)))
        messages.append({"from": "gpt", "value": answer})
    said = [a.tokens[0] for a in engine.answers(requests)]
    assert said == [e[0] for e in expected]
    assert len(expected) == 3
