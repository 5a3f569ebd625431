"""From requests to token ids: template, one tokenizer call for many prompts, image rows, length checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from weakref import ref

from PIL import Image
from transformers import PreTrainedTokenizerBase

from tinyllava_fast.data.objects import DecodedImage
from tinyllava_fast.data.templates._literal import is_literal, literal_prompts, literal_ready
from tinyllava_fast.data.templates.base import Template
from tinyllava_fast.data.types import IMAGE_INDEX, IMAGE_TOKEN
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.fields import is_text, shown
from tinyllava_fast.infer.fast_model.adapters import Adapters
from tinyllava_fast.infer.scheduling.images import ImageEncoder
from tinyllava_fast.infer.scheduling.sequence import (
    IMAGE_ROW,
    ImageSpan,
    NoRoomError,
    OnToken,
    Sequence,
    TooLongError,
)
from tinyllava_fast.infer.shaping import Shaper
from tinyllava_fast.infer.text import TextStream
from tinyllava_fast.infer.types import IMAGE, ImageLike, Message, Request, markers

NO_ROOM = "exceed the K/V pool"
"""A part of ``Answer.why`` where the model could answer, but not with the memory of its engine."""


@dataclass(frozen=True)
class Prompts:
    """Turns requests into sequences.

    template: chat template with ``prompt_batch`` and ``encode``. decoder: the tokenizer that makes text of answers, in
    the engine's thread (default: ``tokenizer``). rows_of: rows that an image becomes. context: most
    positions of the model, None if unlimited. most: largest prompt + answer that the K/V pool takes. eos: tokens that
    end an answer unless the request says otherwise. ahead: requests read and tokenized together. adapters: those that
    requests may name.
    """

    template: Template
    tokenizer: PreTrainedTokenizerBase
    rows_of: Callable[[ImageLike], int]
    context: int | None
    most: int
    eos: frozenset[int]
    ahead: int
    adapters: Adapters
    decoder: PreTrainedTokenizerBase | None = None

    def sequences(
        self, requests: Iterable[Request], on_token: OnToken | None = None, *, truncate: bool = False
    ) -> Iterator[Sequence]:
        """Yield one sequence per request, in order, read lazily. on_token: takes text while it is generated.

        A request that cannot be run has failed already. Its error is a UserError that names it: for markers that do not
        match its images and for a prompt that does not fit the context, NoRoomError if it does not fit the pool,
        DataError for an image whose size has to be known and cannot be read. truncate: a request whose prompt fits the
        context but not with all of its new tokens gets as many as fit.
        """
        source = iter(requests)
        while chunk := list(islice(source, self.ahead)):
            for request, ids in self._each(chunk):
                yield self._ready_or_failed(request, ids, on_token, truncate)

    def _ready_or_failed(
        self, request: Request, ids: list[int] | UserError, on_token: OnToken | None, truncate: bool
    ) -> Sequence:
        try:
            if isinstance(ids, UserError):
                raise ids
            sequence = self._fitting(request, ids, truncate)
            sampling = sequence.request.sampling
            self._check_pool(sequence, sampling.max_new_tokens)
            sequence.stop_ids = sampling.end_ids(self.eos)
            sequence.shaping = self._shaper.shaping(sequence.request, sequence.prompt, sequence.stop_ids)
        except UserError as error:
            failed = Sequence(request, [])
            failed.fail(error)
            return failed
        sequence.on_token = on_token
        if on_token is not None or sampling.stop:
            sequence.text = TextStream(self.decoder or self.tokenizer, sampling.stop_strings)
        return sequence

    def surely_fits(self, request: Request) -> bool:
        """Return whether a request is so short that it fits the context and the pool, without tokenizing it.

        A character of ASCII is at most three tokens, the bytes of a word-start mark; so is a mark at a cut by an image.
        False says nothing: the request may still fit.
        """
        text = request.messages[0]["value"] if len(request.messages) == 1 else None
        if not isinstance(text, str) or not text.isascii():
            return False
        try:
            rows = sum(self.rows_of(image) for image in request.images)
        except DataError:
            return False
        marks = 3 * (len(request.images) + text.count(IMAGE_TOKEN))
        most = self._around + 3 * len(text) + marks + rows + request.sampling.max_new_tokens
        return most <= min(self.most, self.context if self.context is not None else self.most)

    @cached_property
    def _shaper(self) -> Shaper:
        return Shaper(self.tokenizer)

    @cached_property
    def _around(self) -> int:
        """Tokens that the template puts around one question."""
        return len(self._ids([Request.ask("")])[0])

    def _each(self, chunk: Items[Request]) -> list[tuple[Request, list[int] | UserError]]:
        """Requests and their ids, tokenized in one call; one by one where a request of the chunk has an error."""
        try:
            return list(zip(chunk, self._ids(chunk), strict=True))
        except UserError:
            return [(request, self._ids_or_error(request)) for request in chunk]

    def _ids_or_error(self, request: Request) -> list[int] | UserError:
        try:
            return self._ids([request])[0]
        except UserError as error:
            return error

    def _fitting(self, request: Request, ids: list[int], truncate: bool) -> Sequence:
        """The sequence of a request, whose prompt and new tokens fit the context. truncate: fewer new tokens may do."""
        sequence = self._sequence(request, ids)
        wanted = request.sampling.max_new_tokens
        if truncate and self.context is not None:
            left = self.context - len(sequence.prompt)
            if left < 1:
                raise TooLongError(
                    f"{request.named}: {len(sequence.prompt)} prompt tokens leave no room for an answer in the "
                    f"model's context of {self.context}; shorten the prompt"
                )
            if left < wanted:
                sampling = replace(request.sampling, max_new_tokens=left)
                sequence.request, sequence.truncated = replace(request, sampling=sampling), True
                return sequence
        self._check_context(sequence, wanted, "lower max_new_tokens")
        return sequence

    def scored(self, questions: Iterable[tuple[Request, Items[str]]]) -> Iterator[Sequence]:
        """One sequence per option of each question, in order, read lazily; errors as for ``sequences``.

        An option is tokenized as the answer of a training sample, so a space that melts into its first token does so
        here. UserError for a question without options, and for an option without a token.
        """
        source = iter(questions)
        while chunk := list(islice(source, max(1, self.ahead // 4))):
            pairs = [(request, option) for request, options in chunk for option in options]
            encoded = iter(self._option_ids(pairs))
            for request, options in chunk:
                if not options:
                    raise UserError(f"{request.named}: it has no options to score; give it one or more")
                for option in options:
                    ids, first = next(encoded)
                    if first >= len(ids):
                        raise UserError(f"{request.named}: option {option!r} is no token of its own; name another")
                    sequence = self._sequence(request, ids[:-1], scored=ids[first:])
                    self._check_context(sequence, 1, f"the option {option!r}")
                    self._check_pool(sequence, 1)
                    yield sequence

    def _option_ids(self, pairs: Items[tuple[Request, str]]) -> list[tuple[list[int], int]]:
        """For each (request, option) the ids up to the option's last token, and where its first one is."""
        if literal := next((r for r, _ in pairs if is_literal(r.messages)), None):
            raise UserError(f"{literal.named}: options are scored after texts, not after parts or a system message")
        conversations = [[*_conversation(r)[:-1], {"from": "gpt", "value": option}] for r, option in pairs]
        flags = [r.interleaved for r, _ in pairs]
        end = self.template.stop_id(self.tokenizer)
        found = []
        for segments in self.template.encode(conversations, self.tokenizer, interleaved=flags):
            ids, spans = segments[0].ids, segments[0].spans
            start, stop = spans[-1] if spans else (len(ids), len(ids))
            while stop > start and ids[stop - 1] == end:
                stop -= 1
            found.append((ids[:stop], start))
        return found

    def _ids(self, requests: Items[Request]) -> list[list[int]]:
        """Token ids, one IMAGE_INDEX an image; tokenized in one call."""
        conversations = [(_conversation(r), r.interleaved) for r in requests]
        prompts: dict[bool, Iterator[list[int]]] = {}
        for literal, encode in ((False, _own_prompts), (True, literal_prompts)):
            some = [pair for pair in conversations if is_literal(pair[0]) is literal]
            texts, flags = [text for text, _ in some], [flag for _, flag in some]
            prompts[literal] = iter(encode(self.template, texts, self.tokenizer, flags))
        return [next(prompts[is_literal(text)]) for text, _ in conversations]

    def _sequence(self, request: Request, ids: list[int], scored: Items[int] = ()) -> Sequence:
        markers, images = ids.count(IMAGE_INDEX), request.images
        if markers and not images:
            raise UserError(f"{request.named}: the chat template needs an image; give it one")
        marker_images = range(markers) if request.interleaved else [0] * markers
        try:
            rows = [self.rows_of(image) for image in images]
        except DataError as error:
            raise DataError(f"{request.named}: {error}") from error
        prompt, spans = expand(ids, [(i, rows[i]) for i in marker_images])
        return Sequence(request, prompt, spans, scored, self._adapter(request))

    def _adapter(self, request: Request) -> int:
        try:
            return self.adapters.number(request.adapter)
        except UserError as error:
            raise UserError(f"{request.named}: {error}") from None

    def _check_context(self, sequence: Sequence, new: int, remedy: str) -> None:
        length = len(sequence.prompt)
        if self.context is not None and length + new > self.context:
            raise UserError(
                f"{_needs(sequence, new)} exceed the model's context of {self.context}; shorten the prompt or {remedy}"
            )

    def _check_pool(self, sequence: Sequence, new: int) -> None:
        needed = len(sequence.prompt) + new
        if needed > self.most:
            raise NoRoomError(
                f"{_needs(sequence, new)} {NO_ROOM}; raise it to {needed} or more "
                "tokens (batch_tokens or kv_cache_bytes)"
            )


@dataclass(frozen=True)
class Preparer:
    """Reads images and makes tokens of texts, for one thread: its prompts have a tokenizer of their own.

    An object with pixels that several requests hold, such as those of one question's choices, is decoded once while
    they are in flight.
    """

    prompts: Prompts
    images: ImageEncoder
    _decoded: dict[int, tuple[ref[Image.Image], ref[DecodedImage]]] = field(default_factory=dict)  # by the object's id

    def __call__(self, request: Request, on_token: OnToken | None = None) -> Sequence:
        """Return the online sequence of a request, one that has failed if it cannot be put to the model."""
        for key in [key for key, (_, decoded) in self._decoded.items() if decoded() is None]:
            del self._decoded[key]
        return prepare(self.prompts, self.images, request, on_token, decode=self._decode)

    def _decode(self, image: ImageLike) -> DecodedImage:
        if not isinstance(image, Image.Image):
            return self.images.decode(image)
        known = self._decoded.get(id(image))
        found = known[1]() if known is not None and known[0]() is image else None
        if found is None:
            found = self.images.decode(image)
            self._decoded[id(image)] = ref(image), ref(found)
        return found

    def literal_ids(self, text: str) -> list[int]:
        """Return the ids of a text without a chat template, in which no control token is anything but text."""
        messages: list[Message] = [{"from": "prompt", "value": [text]}]
        return literal_prompts(self.prompts.template, [messages], self.prompts.tokenizer, [False])[0]

    def warm_up(self) -> None:
        """Make now what the first text with the name of a control token would wait for: a second or two."""
        literal_ready(self.prompts.template, self.prompts.tokenizer)


def prepare(
    prompts: Prompts,
    images: ImageEncoder,
    request: Request,
    on_token: OnToken | None = None,
    *,
    truncate: bool = True,
    decode: Callable[[ImageLike], DecodedImage] | None = None,
) -> Sequence:
    """Return the online sequence of a request whose images have been read; one that has failed if they cannot be.

    truncate: as for ``Prompts.sequences``. decode: makes pixels of an image (default: ``images.decode``).
    """
    try:
        if request.images:
            distinct = {id(image): image for image in request.images}  # a list may name one many times
            decoded = {key: (decode or images.decode)(image) for key, image in distinct.items()}
            read = [decoded[id(image)] for image in request.images]
            request = replace(request, image=read if request.interleaved else read[0])
    except DataError as error:
        sequence = Sequence(request, [])
        sequence.fail(DataError(f"{request.named}: {error}"))
    else:
        (sequence,) = prompts.sequences([request], on_token, truncate=truncate)
    sequence.online = True
    return sequence


def _needs(sequence: Sequence, new: int) -> str:
    return f"{sequence.request.named}: {len(sequence.prompt)} prompt tokens and {new} new ones"


def expand(ids: list[int], images: Iterable[tuple[int, int]]) -> tuple[list[int], list[ImageSpan]]:
    """Replace each image marker by as many IMAGE_ROW entries as its image has tokens, and return where they lie.

    images: (index, rows) of the image of each marker.

    >>> expand([1, -200, 5, -200], [(0, 2), (1, 1)])
    ([1, -1, -1, 5, -1], [ImageSpan(start=1, rows=2, image=0), ImageSpan(start=4, rows=1, image=1)])
    """
    each = iter(images)
    expanded: list[int] = []
    spans: list[ImageSpan] = []
    for i in ids:
        if i != IMAGE_INDEX:
            expanded.append(i)
            continue
        image, rows = next(each)
        spans.append(ImageSpan(len(expanded), rows, image))
        expanded += [IMAGE_ROW] * rows
    return expanded, spans


def _own_prompts(
    template: Template, conversations: Items[Items[Message]], tokenizer: PreTrainedTokenizerBase, flags: Items[bool]
) -> list[list[int]]:
    return [prompt.ids for prompt in template.prompt_batch(conversations, tokenizer, flags)]


def _conversation(request: Request) -> list[Message]:
    messages = request.conversation()
    if is_literal(messages):
        _check_roles(request)
    for m in messages[:-1]:
        for part in _parts(m):
            if part is not IMAGE and (not isinstance(part, str) or not is_text(part)):
                raise UserError(f"{request.named}: {shown(part)} is no text that a tokenizer takes; mend it")
    turns = messages[1:] if messages[0].get("from") == "system" else messages
    counts = [markers(m["value"]) for m in turns]
    if any(counts) and not request.images:
        raise UserError(f"{request.named}: its text holds {IMAGE_TOKEN} but it has no image; give it one")
    if request.interleaved and sum(counts) != len(request.images):
        raise UserError(
            f"{request.named}: it has {len(request.images)} images but its text holds {sum(counts)} {IMAGE_TOKEN}; "
            "give one marker for each image, or none at all"
        )
    if request.images and not request.interleaved and max(counts) > 1:
        raise UserError(
            f"{request.named}: its text holds {max(counts)} {IMAGE_TOKEN} but it has one image; give a list of as many "
            "images, or one marker"
        )
    if any(count and m["from"] == "gpt" for m, count in zip(turns, counts, strict=True)):
        raise UserError(f"{request.named}: an answer holds {IMAGE_TOKEN}, which would show an image; remove it")
    return messages


def _check_roles(request: Request) -> None:
    """Raise UserError for a request with literal text whose messages are not questions and answers in turn."""
    roles = [m.get("from") for m in request.messages]
    if roles == ["prompt"]:
        return
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["human" if n % 2 == 0 else "gpt" for n in range(len(turns))] or len(turns) % 2 == 0:
        raise UserError(
            f"{request.named}: its messages are from {', '.join(map(shown, roles[:8]))}; give 'human' and 'gpt' in "
            "turn, first and last 'human', after at most one from 'system'"
        )
    if roles[0] == "system" and IMAGE in _parts(request.messages[0]):
        raise UserError(f"{request.named}: its system text holds an image; put it into a question")


def _parts(message: Message) -> list[object]:
    value = message["value"]
    return list(value) if isinstance(value, (list, tuple)) else [value]
