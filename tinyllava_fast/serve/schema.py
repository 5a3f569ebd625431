"""Requests of clients, as pydantic models of OpenAI's requests: strict types, ranges, no unknown parameter.

Parameters that OpenAI takes and that change nothing here are IGNORED. Beside OpenAI's there are those that other
servers of open models have: top_k, min_p, repetition_penalty, ignore_eos, stop_token_ids, structured_outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinyllava_fast.serve.problems import ApiError, bad

MOST_STOPS = 16
MOST_BIASES = 1024
MOST_PARTS = 1024
MOST_TEXT = 2**20  # characters of a prompt's part
MOST_PROMPTS = 64
MOST_LOOKED_AT = 64  # tokens of an answer

IGNORED = frozenset(
    {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    | {"parallel_tool_calls", "reasoning_effort", "verbosity"}
)
"""Taken and not looked at, as they do not change what a model like these answers."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
"""Parameters of OpenAI's and of other servers that are taken with these values alone.

Prompts are what they were in training, so a client does not set variables of a chat template.
"""

Text = Annotated[str, Field(max_length=MOST_TEXT)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    """No unknown field, no conversion of types, no infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class TextPart(Strict):
    """Text of a message."""

    type: Literal["text"]
    text: Text


class ImageUrl(Strict):
    """The place of an image."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(Strict):
    """One message. Only the user shows images."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=MOST_PARTS)]
    name: str | None = Field(None, max_length=64)
    refusal: None = None

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content as parts."""
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return list(self.content)


class StreamOptions(Strict):
    """Of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(Strict):
    """A named JSON schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, object] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """The form of an answer in other words: one of the three."""

    json_: dict[str, object] | None = Field(None, alias="json")
    regex: str | None = Field(None, max_length=4096)
    choice: list[Annotated[str, Field(min_length=1, max_length=1024)]] | None = Field(
        None, min_length=1, max_length=1024
    )


class Generation(Strict):
    """Parameters that chat and plain completion share."""

    model: str | None = Field(None, max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MOST_BIASES)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    ignore_eos: bool | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=MOST_STOPS)
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None

    @property
    def new_tokens(self) -> int | None:
        """Most new tokens, if the request says so."""
        return self.max_tokens

    @property
    def top_count(self) -> int | None:
        """Return how many tokens are reported beside each one that was chosen; None: no log-probability at all."""
        return None

    @property
    def wants_usage(self) -> bool:
        """Return whether a stream ends in a chunk that counts its tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Generation):
    """A body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def new_tokens(self) -> int | None:
        """See the base class."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top_count(self) -> int | None:
        """See the base class."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generation):
    """A body of /v1/completions."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def top_count(self) -> int | None:
        """See the base class."""
        return self.logprobs

    @property
    def prompts(self) -> Sequence[str]:
        """The prompts, each of which gets its own choices."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class LookRequest(Strict):
    """A body of /v1/look: a chat of which the greedy answer is looked into."""

    model: str | None = Field(None, max_length=256)
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int = Field(MOST_LOOKED_AT, ge=1, le=MOST_LOOKED_AT)


class TokenizeRequest(Strict):
    """A body of /tokenize."""

    model: str | None = None
    prompt: Text


class DetokenizeRequest(Strict):
    """A body of /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]] = Field(max_length=2**20)


Body = TypeVar("Body", bound=Strict)
_FIELD = re.compile(r"(?!str$)[^-\[]+")  # other steps of pydantic's name the kinds that a value may have


def read_as(kind: type[Body], found: dict[str, object]) -> Body:
    """Return a body as a request of that kind. Raises ApiError 400 that names the first parameter that is wrong."""
    for name, values in NEUTRAL.items():
        if found.get(name) is not None and found[name] not in values:
            raise bad(f"{name} is not supported by this server", param=name, code="unsupported_parameter")
    known = kind.model_fields
    kept = {k: v for k, v in found.items() if k in known or (k not in IGNORED and k not in NEUTRAL)}
    if extra := next((name for name in kept if name not in known), None):
        raise bad(f"Unrecognized request argument supplied: {extra[:80]}", param=extra[:80])
    try:
        return kind.model_validate(kept)
    except ValidationError as error:
        raise _told(error) from None


def _told(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    named = takewhile(lambda step: isinstance(step, int) or _FIELD.fullmatch(step), first["loc"])
    where = ".".join(map(str, named))[:80]
    if first["type"] == "extra_forbidden":
        where = ".".join(map(str, first["loc"]))[:80]
        return bad(f"Unrecognized request argument supplied: {where}", param=where)
    return bad(f"{where}: {first['msg']}", param=where)
