"""Requests to the inference engine, and its answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinyllava_fast.data.objects import ImageInput, ImageLike, image_objects
from tinyllava_fast.data.types import IMAGE_TOKEN, ImagePart
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.grammar import Grammar

MOST_LOGPROBS = 20
"""Most tokens that ``Sampling.logprobs`` shows beside the one generated."""

Images = ImageInput | Sequence[ImageInput]
IMAGE = ImagePart.IMAGE  # a part of a message that stands for the next image
Parts = list[str | ImagePart] | tuple[str | ImagePart, ...]
Message = dict[str, Any]  # {"from": "human" | "gpt" | "system", "value": str | Parts}


def markers(value: str | Parts) -> int:
    """Return how many image markers a message's value holds.

    >>> markers("<image> is it red?"), markers([IMAGE, "what is <image>?"])
    (1, 1)
    """
    return value.count(IMAGE) if isinstance(value, (list, tuple)) else str(value).count(IMAGE_TOKEN)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The choice of tokens, and the end of a sequence. ValueError for a value out of range."""

    max_new_tokens: int = 64
    """Most tokens generated."""
    temperature: float = 0.0
    """0: greedy. Above: softmax(logits / temperature) is sampled, after top_k, then top_p, then min_p.

    These logits are the model's with the penalties, then logit_bias, then the grammar applied to them.
    """
    top_k: int = 0
    """Only the k most probable tokens are sampled; 0: all."""
    top_p: float = 1.0
    """Only the fewest most probable tokens whose probabilities reach this sum are sampled; 1: all."""
    min_p: float = 0.0
    """Only tokens at least this times as probable as the most probable one are sampled; 0: all."""
    repetition_penalty: float = 1.0
    """Above 1: tokens of the prompt and of the answer so far become less likely; below 1: likelier. From 0.01 to 100.

    As transformers does it: a positive logit is divided by it, a negative one multiplied.
    """
    presence_penalty: float = 0.0
    """Taken off the logit of each token that is in the answer so far, -2 to 2."""
    frequency_penalty: float = 0.0
    """Taken off the logit of each token as often as it is in the answer so far, -2 to 2."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens, -100 to 100."""
    seed: int = 0
    """Seed of this request's own draws, which do not depend on what runs beside it; for temperature > 0."""
    stop: str | Sequence[str] = ()
    """Texts that end the answer; it is cut before the one that comes first. A single text may stand alone."""
    eos_token_id: int | Sequence[int] | None = None
    """Tokens that end the answer. None: the model's own and the chat template's; (): none."""
    stop_token_ids: Sequence[int] = ()
    """Further tokens that end the answer, which are not of its text."""
    logprobs: int | None = None
    """None, or: the answer tells the log-probability of each token, and of so many of the likeliest beside it."""
    grammar: Grammar | None = None
    """The form that the answer must have. It ends only where that is complete, and where nothing more can follow;
    max_new_tokens and stop texts may still cut it."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (all tokens) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be in [0, 1]")
        self._check_penalties()
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise ValueError(f"logprobs is {self.logprobs}; it must be None or from 0 to {MOST_LOGPROBS}")
        if "" in self.stop_strings:
            raise ValueError("stop holds an empty text, which would end every answer at once; remove it")

    @property
    def plain(self) -> bool:
        """Return whether tokens come from the model's logits as they are, and nothing is told of their probability."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties == (1, 0, 0) and not self.logit_bias and self.logprobs is None and self.grammar is None

    def _check_penalties(self) -> None:
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be from 0.01 to 100 (1: none)")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not -2 <= value <= 2:
                raise ValueError(f"{name} is {value}; it must be from -2 to 2")
        for token, bias in self.logit_bias.items():
            if token < 0 or not -100 <= bias <= 100:
                raise ValueError(
                    f"logit_bias is {bias} for token {token}; it must be from -100 to 100, the token an id"
                )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) and self.stop else tuple(self.stop)

    def end_ids(self, default: frozenset[int]) -> frozenset[int]:
        """Return all tokens that end the answer. default: those of the model, where ``eos_token_id`` is None."""
        if self.eos_token_id is None:
            ids = default
        else:
            ids = frozenset([self.eos_token_id] if isinstance(self.eos_token_id, int) else self.eos_token_id)
        return ids.union(self.stop_token_ids)


SETTINGS: Mapping[str, Callable[[str], float]] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
}
"""Settings of Sampling that people change, and the kind of each."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question, or one conversation to be continued.

    image: path, PIL image, NumPy array (uint8, [H, W, 3]), bytes of an image file or an open one; None for text only.
        Every image marker of the messages stands for this image. Or a list of them: then the i-th marker is the i-th
        image, wherever it stands, and their numbers must agree. DataError for anything else.
    messages: LLaVA turns, human first, the last one human. A value is a text of whoever wrote the program, in which
        ``<image>`` is a marker and the tokenizer's control tokens are what they are; or a sequence of parts: a str is
        literal, for what others typed, so nothing in it is a marker or a control token, and IMAGE is a marker. A
        leading message from "system" replaces the template's system text; it is literal in both forms.
        A single message from "prompt", made of parts, is the whole prompt, without the chat template.
        If there are images and no marker, the images are placed at the front of the first turn, in order.
    id: any text that names the request in answers and messages.
    priority: of requests that come one by one (``Engine.add_request``), smaller ones run first.
    adapter: name of the adapter (``Engine.load_adapter``) that the model answers with; None: as it is.
    """

    messages: Sequence[Message]
    image: Images | None = None
    sampling: Sampling = field(default_factory=Sampling)
    id: str = ""
    priority: int = 0
    adapter: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", image_objects(self.image))

    @property
    def named(self) -> str:
        """Return its name in messages."""
        return f"request {self.id!r}" if self.id else "the question"

    @staticmethod
    def ask(
        question: str,
        image: Images | None = None,
        *,
        sampling: Sampling | None = None,
        id: str = "",
        adapter: str | None = None,
    ) -> Request:
        """A single-turn request. UserError if the question is no text."""
        if not isinstance(question, str):
            raise UserError(f"the question: expected a text, got {type(question).__name__}")
        messages = [{"from": "human", "value": question}]
        return Request(messages=messages, image=image, sampling=sampling or Sampling(), id=id, adapter=adapter)

    @property
    def images(self) -> tuple[ImageLike, ...]:
        """Its images, none, one or several."""
        if self.image is None:
            return ()
        return tuple(self.image) if self.interleaved else (self.image,)  # type: ignore[arg-type, return-value]

    @property
    def interleaved(self) -> bool:
        """Return whether the images are a list, so that each marker stays where it is and stands for its own."""
        return isinstance(self.image, tuple)

    def conversation(self) -> list[Message]:
        """The messages and the open answer; image markers go in the first turn if there is none yet."""
        messages = [dict(m) for m in self.messages]
        turns = messages[1:] if messages and messages[0].get("from") == "system" else messages
        if turns and not any(markers(m["value"]) for m in turns):
            first = turns[0]["value"]
            if isinstance(first, (list, tuple)):
                turns[0]["value"] = [IMAGE, "\n"] * len(self.images) + list(first)
            else:
                turns[0]["value"] = f"{IMAGE_TOKEN}\n" * len(self.images) + str(first)
        return [*messages, {"from": "gpt", "value": None}]


@dataclass(frozen=True)
class TokenLogprob:
    """The probability of a token that the model has generated.

    The probabilities are those of softmax over the tokenizer's vocabulary, of the model's own logits: before penalties,
    bias, grammar and temperature, as OpenAI's.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(id, log-probability) of the likeliest tokens, likeliest first."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The model's answer to one request."""

    id: str
    text: str
    """Decoded without special tokens, cut before a stop text, stripped."""
    tokens: list[int]
    """Generated ids; the end-of-sequence token, if reached, is the last."""
    finish: str
    """"eos", "stop" (a stop text, a stop token, or a grammar that nothing more can follow) or "length".

    Of ``Engine.step`` and of a run that keeps going also those of infer/finish.py: CONTEXT, ABORTED, and TOO_LONG,
    UNREADABLE, REFUSED or FAILED with an empty answer to a request that could not be answered.
    """
    prompt_tokens: int
    """Length of the prompt, image tokens included; 0 if it was not put to the model."""
    cached_tokens: int = field(default=0, compare=False)
    """Tokens of the prompt whose K/V were there already, from an earlier request that begins with them."""
    why: str = ""
    """The fault of a request that could not be answered."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One for each of ``tokens``, if the request asked for them."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Probabilities of the options given to ``Engine.score``, in their order."""

    id: str
    options: tuple[str, ...]
    sums: list[float]
    """log p(option | prompt): the sum over the option's tokens; the end token is not one of them."""
    means: list[float]
    """The same divided by the number of tokens."""
    greedy: list[bool]
    """True where greedy decoding would begin with exactly this option."""
    prompt_tokens: int
    """Length of the prompt, image tokens included."""

    @property
    def best(self) -> int:
        """Index of the option with the greatest sum; the first of equals."""
        return max(range(len(self.sums)), key=self.sums.__getitem__)
