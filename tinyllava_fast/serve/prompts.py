"""From OpenAI's messages and parameters to the engine's Request. What a user types is text, whatever it spells."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from tinyllava_fast.data.types import laid_out
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.grammar import Grammar
from tinyllava_fast.infer.types import IMAGE, Message, Request, Sampling
from tinyllava_fast.serve.limits import ServerLimits
from tinyllava_fast.serve.problems import bad
from tinyllava_fast.serve.schema import ChatMessage, Generation, ImagePart, TextPart
from tinyllava_fast.serve.served import Served

ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}


def image_urls(messages: Iterable[ChatMessage], limits: ServerLimits) -> list[str]:
    """Return where the images of the messages are, in order. ApiError 400 for too many, or one that no user shows."""
    urls: list[str] = []
    for number, message in enumerate(messages):
        found = [part.image_url.url for part in message.parts if isinstance(part, ImagePart)]
        if found and message.role != "user":
            raise bad("only messages of the user hold images", f"messages.{number}.content")
        urls += found
    if len(urls) > limits.images:
        raise bad(f"{len(urls)} images; a request may hold {limits.images}", "messages")
    return urls


def texts(messages: Iterable[ChatMessage]) -> str:
    """Return all texts of the messages in one."""
    return "".join(part.text for message in messages for part in message.parts if isinstance(part, TextPart))


def check_length(prompts: Iterable[str], served: Served, param: str) -> None:
    """Raise ApiError 400 for texts of a parameter that cannot fit the model's context, however few tokens they are."""
    most, length = served.most_characters, max(map(len, prompts))
    if most is not None and length > most:
        said = f"{length} characters of text do not fit the model's context of {served.context} tokens"
        raise bad(said, param, "context_length_exceeded")


def turns(messages: Sequence[ChatMessage], limits: ServerLimits) -> list[Message]:
    """Return the messages as the engine's: a system text if there is one, then user and assistant in turn.

    Neighbours of one role become one message. ApiError 400 for too many messages, and for roles in another order.
    """
    if len(messages) > limits.messages:
        raise bad(f"{len(messages)} messages; a request may hold {limits.messages}", "messages")
    found: list[Message] = []
    for number, message in enumerate(messages):
        role, value = ROLES[message.role], value_of(message.parts)
        if found and found[-1]["from"] == role:
            found[-1]["value"] = [*found[-1]["value"], "\n", *value]
            continue
        if role == "system" and found:
            raise bad("system messages stand before all others", f"messages.{number}.role")
        if role == "gpt" and (not found or found[-1]["from"] == "system"):
            raise bad("the first message after the system's must be the user's", f"messages.{number}.role")
        found.append({"from": role, "value": value})
    if found[-1]["from"] != "human":
        raise bad("the last message must be the user's", f"messages.{len(messages) - 1}.role")
    return found


def value_of(parts: Sequence[TextPart | ImagePart]) -> list[Any]:
    """Return one message's parts for the engine, as training lays them out."""
    return laid_out([part.text if isinstance(part, TextPart) else IMAGE for part in parts])


@dataclass(frozen=True)
class Ask:
    """A checked body, ready to be put to a model: all but the images and the messages."""

    body: Generation
    served: Served
    limits: ServerLimits

    @property
    def choices(self) -> int:
        """How many answers are wanted. ApiError 400 for too many."""
        count = self.body.n or 1
        if count > self.limits.choices:
            raise bad(f"n is {count}; at most {self.limits.choices} choices are made at once", "n")
        return count

    def requests(self, conversation: Sequence[Message], images: Sequence[Image.Image], name: str) -> list[Request]:
        """Return one request a choice; they differ in their seeds. ApiError 400 for a parameter out of range."""
        seed = secrets.randbits(62) if self.body.seed is None else self.body.seed
        return [
            Request(
                messages=conversation,
                image=list(images) or None,
                sampling=self._sampling(seed + index),
                id=f"{name}-{index}",
                adapter=self.served.adapter,
            )
            for index in range(self.choices)
        ]

    def _sampling(self, seed: int) -> Sampling:
        body = self.body
        stop = [body.stop] if isinstance(body.stop, str) else body.stop
        settings: dict[str, Any] = {
            "max_new_tokens": self._new_tokens(),
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "top_k": max(body.top_k or 0, 0),
            "seed": seed,
            "stop": tuple(stop or ()),
            "eos_token_id": () if body.ignore_eos else None,
            "stop_token_ids": tuple(body.stop_token_ids or ()),
            "min_p": body.min_p,
            "repetition_penalty": body.repetition_penalty,
            "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty,
            "logit_bias": self._biases() or None,
            "logprobs": body.top_count,
            "grammar": grammar_of(body),
        }
        kept = {name: value for name, value in settings.items() if value is not None}
        try:
            return Sampling(**kept)
        except ValueError as error:
            raise bad(str(error)) from None

    def _new_tokens(self) -> int:
        asked, most = self.body.new_tokens, self.limits.new_tokens
        if asked is not None and asked > most:
            raise bad(f"max_tokens is {asked}; at most {most} new tokens are generated", "max_tokens")
        return most if asked is None else asked

    def _biases(self) -> dict[int, float]:
        found: dict[int, float] = {}
        for name, value in (self.body.logit_bias or {}).items():
            if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < self.served.engine.vocab):
                raise bad(f"logit_bias: {name[:20]!r} is no token of this model", "logit_bias")
            found[int(name)] = value
        return found


def grammar_of(body: Generation) -> Grammar | None:
    """Return the form that an answer must have. ApiError 400 for two of them at once, and for one that is none."""
    wanted: list[tuple[str, Callable[[], Grammar]]] = []
    form, other = body.response_format, body.structured_outputs
    if form is not None and form.type == "json_object":
        wanted.append(("response_format", Grammar.json_object))
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise bad("response_format: json_schema is missing", "response_format.json_schema")
        schema = form.json_schema.schema_
        wanted.append(("response_format.json_schema", lambda: Grammar.json_schema(schema)))
    if other is not None:
        name = "structured_outputs"
        if (json := other.json_) is not None:
            wanted.append((f"{name}.json", lambda: Grammar.json_schema(json)))
        if (regex := other.regex) is not None:
            wanted.append((f"{name}.regex", lambda: Grammar.regex(regex)))
        if (choice := other.choice) is not None:
            wanted.append((f"{name}.choice", lambda: Grammar.choice(choice)))
    if len(wanted) > 1:
        raise bad("an answer can have one form; name one of them", wanted[1][0])
    try:
        return wanted[0][1]() if wanted else None
    except UserError as error:
        raise bad(str(error), wanted[0][0]) from None
