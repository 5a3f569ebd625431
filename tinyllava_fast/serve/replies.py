"""From the engine's answers to OpenAI's objects: whole ones, and the chunks of a stream."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tinyllava_fast.infer.finish import ABORTED, CONTEXT, REFUSED, TOO_LONG, UNREADABLE
from tinyllava_fast.infer.live import Piece
from tinyllava_fast.infer.scheduling.prompts import NO_ROOM
from tinyllava_fast.infer.types import Answer, TokenLogprob
from tinyllava_fast.serve.problems import ApiError, bad, busy

Json = dict[str, Any]  # what goes to a client as JSON
_FINISH = {"eos": "stop", "stop": "stop", "length": "length", CONTEXT: "length"}
_NAMED = re.compile(r"^request '[^']*': ")
_WORD_START = "\u2581"


def check(answer: Answer, param: str = "messages") -> None:
    """Raise ApiError for a request that could not be answered. param: what holds its text.

    The engine's words are passed on where they are about what the client sent; others could tell of this machine.
    """
    if answer.finish in _FINISH:
        return
    if answer.finish == ABORTED:
        raise busy("the server is stopping")
    why = _NAMED.sub("", answer.why)
    if answer.finish == TOO_LONG:
        raise bad(why, param, "context_length_exceeded")
    if answer.finish == UNREADABLE:
        raise bad(why, param, "invalid_image")
    if answer.finish == REFUSED:
        raise bad(why)
    if NO_ROOM in why:
        raise bad("the prompt and its new tokens are more than this server holds", param, "context_length_exceeded")
    raise ApiError(500, "the model could not answer this request")


@dataclass(frozen=True)
class Reply:
    """The objects of one request to a model.

    kind: of the route. prompts: how many different prompts there are; each counts once in the usage.
    """

    kind: Literal["chat", "text"]
    id: str
    model: str
    tokenizer: Any
    logprobs: bool
    prompts: int = 1
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def param(self) -> str:
        """Return the parameter of the request that holds its text."""
        return "messages" if self.kind == "chat" else "prompt"

    def whole(self, answers: Sequence[Answer]) -> Json:
        """Return the object of a request that is not streamed."""
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        choices = [
            self._choice(index, self._said(answer.text), answer.logprobs, _FINISH[answer.finish])
            for index, answer in enumerate(answers)
        ]
        return {**self._head(name), "choices": choices, "usage": self.usage(answers)}

    def first(self, index: int) -> Json | None:
        """Return the chunk that opens a choice of a chat; plain completions have none."""
        if self.kind == "text":
            return None
        return self._chunk(self._choice(index, {"delta": {"role": "assistant", "content": ""}}, [], None))

    def piece(self, index: int, piece: Piece) -> Json:
        """Return the chunk of a piece of text."""
        said: Json = {"delta": {"content": piece.text}} if self.kind == "chat" else {"text": piece.text}
        return self._chunk(self._choice(index, said, piece.logprobs, None))

    def last(self, index: int, answer: Answer) -> Json:
        """Return the chunk that ends a choice."""
        said: Json = {"delta": {}} if self.kind == "chat" else {"text": ""}
        return self._chunk(self._choice(index, said, [], _FINISH[answer.finish]))

    def counted(self, answers: Sequence[Answer]) -> Json:
        """Return the chunk that ends a stream whose usage is wanted."""
        return {**self._chunk(), "usage": self.usage(answers)}

    def usage(self, answers: Sequence[Answer]) -> Json:
        """Return how many tokens were read, taken from a cache, and generated."""
        firsts = answers[:: len(answers) // self.prompts]
        prompt = sum(answer.prompt_tokens for answer in firsts)
        new = sum(len(answer.tokens) for answer in answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in firsts)},
        }

    def _head(self, name: str) -> Json:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def _chunk(self, *choices: Json) -> Json:
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return {**self._head(name), "choices": list(choices)}

    def _said(self, text: str) -> Json:
        if self.kind == "text":
            return {"text": text}
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _choice(self, index: int, said: Json, logprobs: Sequence[TokenLogprob], finish: str | None) -> Json:
        found = None
        if logprobs or (self.logprobs and "message" in said):
            found = self._chat_logprobs(logprobs) if self.kind == "chat" else self._text_logprobs(logprobs)
        return {"index": index, **said, "logprobs": found, "finish_reason": finish}

    def _chat_logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json:
        content = [
            {**self._token(one.id, one.logprob), "top_logprobs": [self._token(*other) for other in one.top]}
            for one in logprobs
        ]
        return {"content": content, "refusal": None}

    def _text_logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json:
        return {
            "tokens": [self._text(one.id) for one in logprobs],
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [{self._text(i): value for i, value in one.top} for one in logprobs],
            "text_offset": [],
        }

    def _token(self, token: int, logprob: float) -> Json:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    def _text(self, token: int) -> str:
        """The text of a token alone; a part of a character is shown as the replacement character."""
        piece = str(self.tokenizer.convert_ids_to_tokens(token))
        if _WORD_START in piece:  # decoding would strip the space that it stands for
            return piece.replace(_WORD_START, " ")
        return str(self.tokenizer.decode([token], skip_special_tokens=False))
