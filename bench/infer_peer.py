"""The peer, as a transformers user asks it: LlavaForConditionalGeneration.generate with our weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.image_processing_utils import BaseImageProcessor

from tinyllava_fast.bench.peer import build_peer
from tinyllava_fast.data.images import load_image, to_pixels
from tinyllava_fast.data.templates.base import Template
from tinyllava_fast.data.tokenizer import largest_id
from tinyllava_fast.data.types import IMAGE_INDEX
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.types import Request
from tinyllava_fast.models.lmm import LMM


@dataclass(frozen=True)
class Prepared:
    """A question as the peer takes it."""

    ids: list[int]  # IMAGE_INDEX where an image begins
    pixels: Tensor  # [1, 3, H, W]


class _Stamps(BaseStreamer):
    """Notes when each token is put out; ``generate`` puts the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """See BaseStreamer."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """See BaseStreamer."""


class Peer:
    """The stock model over our weights, with prompts and images prepared beforehand.

    lmm: in float32, before any cast. UserError for a model that Llava cannot express.
    """

    def __init__(
        self,
        lmm: LMM,
        tokenizer: PreTrainedTokenizerBase,
        processor: BaseImageProcessor,
        template: Template,
        feature_layer: int,
        dtype: torch.dtype,
        device: str = "cpu",
    ) -> None:
        self.tokenizer, self.processor, self.template = tokenizer, processor, template
        self.rows = lmm.tokens_per_image
        # Llava marks image positions by an id; this one is only ever generated, see prepare()
        self.image_token = lmm.vocab_size - 1
        model: LlavaForConditionalGeneration = build_peer(
            lmm, feature_layer=feature_layer, image_token=self.image_token
        )
        self.model = model.to(dtype).to(torch.device(device)).eval()  # type: ignore[arg-type]
        self.model.config.text_config.use_cache = True
        generation = self.model.generation_config
        generation.eos_token_id, generation.pad_token_id, generation.use_cache = None, 0, True
        self.suppressed = list(range(largest_id(tokenizer)[1] + 1, lmm.vocab_size)) or None

    def prepare(self, questions: Sequence[tuple[str, str]]) -> list[Prepared]:
        """Tokenize the prompts and preprocess the images of (image file, text) pairs."""
        conversations = [Request.ask(text, image).conversation() for image, text in questions]
        prompts = self.template.prompt_batch(conversations, self.tokenizer)
        if any(self.image_token in p.ids for p in prompts):
            raise UserError(f"a question holds token {self.image_token}, which marks images for the peer; leave it out")
        pixels = [to_pixels([load_image(image)], self.processor) for image, _ in questions]
        return [Prepared(p.ids, x) for p, x in zip(prompts, pixels, strict=True)]

    def answer(self, questions: Sequence[Prepared], batch: int, new_tokens: int) -> list[list[int]]:
        """Return the greedy ids of each question, ``batch`` at a time, padded on the left."""
        answers: list[list[int]] = []
        for i in range(0, len(questions), batch):
            answers += self._generate(questions[i : i + batch], new_tokens).tolist()
        return answers

    def stamps(self, question: Prepared, new_tokens: int) -> list[float]:
        """Return the clock at the start and at each token of one question."""
        streamer = _Stamps()
        began = time.perf_counter()
        self._generate([question], new_tokens, streamer=streamer)
        return [began, *streamer.times[1:]]

    @torch.inference_mode()
    def _generate(self, questions: Sequence[Prepared], new_tokens: int, streamer: BaseStreamer | None = None) -> Tensor:
        rows = [
            [j for i in q.ids for j in ([self.image_token] * self.rows if i == IMAGE_INDEX else [i])] for q in questions
        ]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
        device = self.model.device
        out = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            pixel_values=torch.cat([q.pixels for q in questions]).to(device, self.model.dtype),
            max_new_tokens=new_tokens,
            do_sample=False,
            suppress_tokens=self.suppressed,
            streamer=streamer,
        )
        answers: Tensor = out[:, longest:]
        return answers
