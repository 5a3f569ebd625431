"""Sequences, what the engine makes of requests, and groups of those that share the beginning of their prompts.

Legend: a prompt is a list of token ids in which every image marker has been expanded to its image's rows of IMAGE_ROW.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from torch import Tensor

from tinyllava_fast.data.objects import DecodedImage, ImageLike
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.infer.finish import ABORTED, FAILED, REFUSED, TOO_LONG, UNREADABLE
from tinyllava_fast.infer.shaping import Shaping
from tinyllava_fast.infer.text import TextStream
from tinyllava_fast.infer.types import Images, Request, TokenLogprob

IMAGE_ROW = -1
_APART = 1 << 160  # more than the numbers of tokens and images span
RESERVE = 16  # rows for new tokens that a sequence holds in advance


class ImageSpan(NamedTuple):
    """The place of an image's rows in a prompt."""

    start: int
    rows: int
    image: int  # its index in the request


OnToken = Callable[[str, str], None]
"""Takes a request's id and the next piece of its text."""


class TooLongError(UserError):
    """A prompt that alone is longer than the model's context."""


class NoRoomError(UserError):
    """A request that the model could answer, but not with the memory that its engine was given."""


_FINISH: dict[type[BaseException], str] = {TooLongError: TOO_LONG, DataError: UNREADABLE, UserError: REFUSED}


class Status(Enum):
    """The stages of a sequence."""

    WAITING = "waiting"
    """It holds no rows of the pool."""
    RUNNING = "running"
    """It holds rows of the pool."""
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"


@dataclass(eq=False)
class Sequence:
    """One sequence of tokens: its request, where its rows lie in the pool, and what it has produced.

    scored: instead of generating, the probabilities of these tokens are wanted; the last position of the prompt
    predicts the last of them.
    """

    request: Request
    prompt: list[int]
    image_spans: Items[ImageSpan] = ()  # one an image marker, ascending
    scored: Items[int] = ()
    adapter: int = 0  # the number of its adapter; 0: none
    online: bool = False  # admitted by itself, in chunks; otherwise with the group of those about the same images
    status: Status = Status.WAITING
    group: Group | None = None
    start: int = 0  # first pool row of the sequence's own tokens, which follow the shared ones
    stem_rows: tuple[int, int] = (0, 0)  # of an online one: (start, length) of rows that it shares; see prefixes.py
    num_reserved_rows: int = 0  # own rows held
    num_cached_tokens: int = 0  # tokens, shared ones included, whose K and V are in the pool
    tokens: list[int] = field(default_factory=list)  # generated
    finish: str = ""  # why it has ended; "" while it has not
    error: BaseException | None = None  # of a failed sequence
    num_reused_tokens: int = 0  # of the prompt: their K and V were there when it was admitted
    truncated: bool = False  # its request wanted more new tokens than the model's context has room for
    stop_ids: frozenset[int] = frozenset()  # tokens that end it
    shaping: Shaping | None = None  # what is done to its logits, and told of them
    text: TextStream | None = None  # where text is needed before the end
    on_token: OnToken | None = None
    result: tuple[Tensor, Tensor] | None = None  # of a scored sequence: log p and greedy of each scored token
    _content: list[int] | None = None  # of the prompt

    @property
    def ended(self) -> bool:
        """Return whether it has finished, failed or been aborted."""
        return self.finish != ""

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Return those of its tokens so far, none if its request does not ask for them."""
        return [] if self.shaping is None else self.shaping.logprobs

    @property
    def shared_rows(self) -> tuple[int, int]:
        """(start, length) of the tokens that it shares with its group, or with others online; (0, 0) for none."""
        group = self.group
        if group is None or not group.num_shared_tokens:
            return self.stem_rows
        return group.shared_start, group.num_shared_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.prompt) + len(self.tokens)

    @property
    def decodes(self) -> bool:
        """Return whether its newest token is all that the model has not seen of it."""
        return bool(self.tokens) and self.num_cached_tokens + 1 == self.num_tokens

    @property
    def num_own_cached(self) -> int:
        """Own rows written so far."""
        return self.num_cached_tokens - self.shared_rows[1]

    @property
    def most_rows(self) -> int:
        """Own rows of the whole sequence: all tokens after the shared ones but the last, which is never fed back."""
        new = 1 if self.scored else self.request.sampling.max_new_tokens
        return len(self.prompt) - self.shared_rows[1] + new - 1

    @property
    def first_rows(self) -> int:
        """Own rows that it is admitted with: what its prefill writes, and room for a short answer."""
        return min(self.most_rows, self.num_tokens - self.shared_rows[1] + RESERVE)

    def ids_between(self, start: int, stop: int) -> list[int]:
        """Return the tokens [start, stop) of prompt and answer."""
        length = len(self.prompt)
        return self.prompt[start:stop] + self.tokens[max(0, start - length) : max(0, stop - length)]

    def images_between(self, start: int, stop: int) -> list[tuple[ImageLike, slice]]:
        """Return the images among the tokens [start, stop), each with the range of its rows that lies there."""
        found = []
        for first, rows, image in self.image_spans:
            low, high = max(start, first), min(stop, first + rows)
            if low < high:
                found.append((self.request.images[image], slice(low - first, high - first)))
        return found

    def content(self) -> list[int]:
        """Return what K and V depend on: its tokens, with a number for the pixels of an image in each of its rows.

        The first one also tells the adapter, so that sequences of two adapters have nothing in common.
        """
        if self._content is None:
            self._content = self.prompt.copy()
            for first, rows, image in self.image_spans:
                self._content[first : first + rows] = [_number(self.request.images[image])] * rows
            self._content[:1] = [i + self.adapter * _APART for i in self._content[:1]]
        return self._content + self.tokens

    def append(self, token: int) -> str:
        """Append a generated token, end if it is the last one, and return the text that is certain now.

        UserError where its grammar cannot be followed; the token is not appended then.
        """
        text, piece = self.text, ""
        finish = "stop" if self.shaping is not None and self.shaping.push(token) else ""
        self.tokens.append(token)
        if token in self.stop_ids:
            finish = "stop" if token in self.request.sampling.stop_token_ids else "eos"
        elif text is not None:
            piece = text.push(token)
            finish = "stop" if text.stopped else finish
        if not finish and len(self.tokens) >= self.request.sampling.max_new_tokens:
            finish = "length"
        if finish and text is not None:
            piece += text.close()
            if text.stopped:
                finish = "stop"
        if finish:
            self.end(finish)
        return piece

    def end(self, finish: str) -> None:
        """Note that it has ended by itself, and why."""
        self.status, self.finish = Status.FINISHED, finish

    def fail(self, error: BaseException) -> None:
        """Note that it cannot go on; ``finish`` tells errors of the request (see finish.py) from FAILED, all others."""
        self.status, self.error, self.finish = Status.FAILED, error, _FINISH.get(type(error), FAILED)

    def abort(self) -> None:
        """Note that nobody wants its answer any more."""
        self.status, self.finish = Status.ABORTED, ABORTED


def num_common_tokens(a: list[int], b: list[int], most: int) -> int:
    """Return how many of the first ``most`` tokens are equal from the beginning on."""
    most = min(most, len(a), len(b))
    if a[:most] == b[:most]:
        return most
    return next(i for i in range(most) if a[i] != b[i])


def _number(image: ImageLike) -> int:
    """Return a negative number for the pixels of a decoded image; token ids are not negative."""
    if not isinstance(image, DecodedImage):
        raise TypeError(f"{type(image).__name__}: only a decoded image is known by its content")
    return -1 - int.from_bytes(image.digest, "big")  # whole: of shorter ones, two that are equal can be sought


@dataclass(eq=False)
class Group:
    """Sequences that ask about the same images and share the first ``num_shared_tokens`` of their prompts."""

    image: Images | None
    members: list[Sequence]
    num_shared_tokens: int = 0
    shared_start: int = 0  # first pool row of the shared tokens
    num_alive: int = 0  # members that hold rows, and with them the shared ones

    def __post_init__(self) -> None:
        self.num_alive = len(self.members)
        for member in self.members:
            member.group = self

    @property
    def shared_ids(self) -> list[int]:
        """The shared tokens themselves."""
        return self.members[0].prompt[: self.num_shared_tokens]

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens that its prefill computes."""
        shared = self.num_shared_tokens
        return shared + sum(m.num_tokens - shared for m in self.members)
