"""Who answers in a conversation: a model that is loaded here, or one behind a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tinyllava_fast.client.content import content_of, data_uri, image_part, text_part
from tinyllava_fast.client.endpoint import Endpoint
from tinyllava_fast.data.images import load_image
from tinyllava_fast.infer.types import SETTINGS, Images, Message, Request, Sampling

if TYPE_CHECKING:
    from tinyllava_fast.infer.assistant import Assistant

Show = Callable[[str], None]
"""Takes each piece of an answer as it comes."""
_OTHERS = tuple(name for name in SETTINGS if name not in ("max_new_tokens", "temperature", "seed"))


@dataclass(frozen=True, kw_only=True)
class Talk:
    """What is to be answered. All texts are literal: nothing in them is a marker or a control token."""

    question: str
    turns: Sequence[tuple[str, str]] = ()
    """Questions and answers before it."""
    images: Sequence[str] = ()
    """Files, shown in front of the first question."""
    system: str | None = None
    """None: the model's own."""
    sampling: Sampling


class Partner(Protocol):
    """Answers in a conversation."""

    name: str

    def check_image(self, path: str) -> None:
        """Raise DataError for an image file that it cannot be shown."""
        ...

    def check_system(self, text: str) -> None:
        """Raise UserError if it is known to take no system text."""
        ...

    def answer(self, talk: Talk, show: Show) -> str:
        """Return the answer, the pieces that ``show`` was given in one. Raises UserError."""
        ...


class LocalPartner:
    """A model that is loaded here."""

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant
        self.name = assistant.engine.source

    def check_image(self, path: str) -> None:
        """See Partner."""
        load_image(path, self.assistant.engine.lmm.config.reading)

    def check_system(self, text: str) -> None:
        """See Partner."""
        from tinyllava_fast.infer.assistant import under_system

        under_system(self.assistant.engine.template, self.assistant.engine.tokenizer, text)

    def answer(self, talk: Talk, show: Show) -> str:
        """See Partner."""
        messages: list[Message] = [] if talk.system is None else [{"from": "system", "value": talk.system}]
        for question, answer in talk.turns:
            messages += [{"from": "human", "value": [question]}, {"from": "gpt", "value": [answer]}]
        messages.append({"from": "human", "value": [talk.question]})
        image: Images | None = list(talk.images) if len(talk.images) > 1 else next(iter(talk.images), None)
        request = Request(messages=messages, image=image, sampling=talk.sampling)
        return self.assistant.engine.answer(request, on_token=lambda _, piece: show(piece)).text


class ServerPartner:
    """A model behind an endpoint. A picture is what its file held when the conversation about it began."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.name = f"{endpoint.model} at {endpoint.url}"
        self._uris: dict[str, str] = {}

    def check_image(self, path: str) -> None:
        """See Partner."""
        self._uris[path] = data_uri(path)

    def check_system(self, text: str) -> None:
        """See Partner: what the server takes is known when it is asked."""

    def answer(self, talk: Talk, show: Show) -> str:
        """See Partner."""
        messages: list[dict[str, object]] = []
        if talk.system is not None:
            messages.append({"role": "system", "content": talk.system})
        shown = [image_part(self._uris[path]) for path in talk.images]
        for question, answer in (*talk.turns, (talk.question, None)):
            messages.append({"role": "user", "content": content_of([*shown, text_part(question)])})
            shown = []
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        pieces: list[str] = []
        with closing(self.endpoint.stream({"messages": messages, **_parameters(talk.sampling)})) as stream:
            for piece in stream:
                pieces.append(piece)
                show(piece)
        return "".join(pieces)


def _parameters(sampling: Sampling) -> dict[str, object]:
    """The settings that differ from their defaults, as not every server knows all of them."""
    found: dict[str, object] = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
    if sampling.temperature:
        found["seed"] = sampling.seed
    plain = Sampling()
    return found | {name: value for name in _OTHERS if (value := getattr(sampling, name)) != getattr(plain, name)}
