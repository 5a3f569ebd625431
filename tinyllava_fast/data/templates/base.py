"""Chat templates: messages to token ids, with the positions that carry a label.

A prompt is cut at ``<image>`` and every piece is tokenized by a call of its own, as the reference does, so the text
after an image has the same ids whatever came before it. Of the tokens that a tokenizer adds to every text, a prompt has
those that stand before it, once; an end token comes from the template alone. Which tokens are supervised follows from
character offsets: those that reach into the space before an answer, the answer, or the end-of-answer string.

A template is one file in this folder; the registry finds it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from tokenizers import Encoding

from tinyllava_fast.data.templates._pieces import Offsets, added_ids, encode_pieces, named_errors
from tinyllava_fast.data.types import IGNORE_INDEX, IMAGE_INDEX, IMAGE_TOKEN
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.fields import shown
from tinyllava_fast.log import log
from tinyllava_fast.registry import Registry

Message = Mapping[str, Any]  # {"from": "human" | "gpt", "value": str | None}
Turns = Sequence[tuple[str, "str | None"]]  # (question, answer); answer None: to be generated
Conversation = Sequence[Message] | Turns
TurnMode = Literal["conversation", "independent"]
MaskMode = Literal["offsets", "reference"]

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Segment:
    """Tokens that attend to one another, and which of them are learnt."""

    ids: list[int]
    """Token ids; IMAGE_INDEX stands for one image."""
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Half-open ranges of supervised tokens, ascending."""
    on_prefix: bool = False
    """It also sees the first segment of its sample, and its positions go on from there."""
    images: tuple[int, ...] = ()
    """Which of the record's images each marker stands for; empty: all for its only one."""

    def labels(self) -> list[int]:
        """One label a token, not shifted: the id where supervised, -100 elsewhere and at images."""
        labels = [IGNORE_INDEX] * len(self.ids)
        for start, stop in self.spans:
            labels[start:stop] = [IGNORE_INDEX if i == IMAGE_INDEX else i for i in self.ids[start:stop]]
        return labels


@dataclass(frozen=True)
class Prompt:
    """An inference prompt."""

    ids: list[int]
    """Token ids as in Segment."""


@dataclass(frozen=True)
class Rendered:
    """Prompt text with literal ``<image>`` and the character ranges that are supervised."""

    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class _Unit:
    """Turns that are rendered together, and the image of each marker (see Segment.images) where a record lists them."""

    turns: Turns
    interleaved: bool = False
    images: tuple[int, ...] = ()
    first: int = 0
    """Number of its first turn in the conversation."""


def turns_of(conversation: Conversation) -> list[tuple[str, str | None]]:
    """Messages as (question, answer) pairs by position, a leading answer left out. DataError if they do not pair up."""
    if not conversation or isinstance(conversation[0], tuple):
        return list(cast(Turns, conversation))
    messages = list(cast(Sequence[Message], conversation))
    if messages[0]["from"] != "human":
        messages = messages[1:]
    values = [m["value"] for m in messages]
    questions, answers = values[0::2], values[1::2]
    if len(questions) != len(answers):
        raise DataError(f"{len(questions)} questions but {len(answers)} answers; every question needs one answer")
    return list(zip(questions, answers, strict=True))


@dataclass(frozen=True)
class Template:
    """The family ``<system> USER: <question> ASSISTANT: <answer><eos>``; others override ``render``."""

    eos: str
    """Text that ends every answer; one special token of the tokenizers it is meant for."""
    system: str = SYSTEM
    separator: str = " ASSISTANT: "
    """Text between question and answer."""
    reference_masks: Literal["generic", "llama", "gemma", "pretrain", "none"] = "generic"
    """Which arithmetic the reference uses for its label masks (``masks: reference``); none: it has no such template."""
    needs_image: bool = False
    """Every sample gets an image slot, whether its question names one or not."""
    adds_special_tokens: bool = True
    """A prompt begins with what the tokenizer puts before a text, its BOS; False: the rendered text carries its own."""
    shows_questions: bool = True
    """A prompt holds the text of the questions."""

    def with_system(self, system: str) -> Template:
        """Return the template with another system text. UserError if it has no place for one."""
        return replace(self, system=system)

    def render(self, turns: Turns, tokenizer: Any, interleaved: bool = False) -> Rendered:
        """Prompt text of the turns; an answer of None ends the text where the model continues.

        interleaved: markers stand for the images of a list and stay where they are. Otherwise there is one image, and
        all markers of a question become one at its front.
        """
        text, spans = self.system + " ", []
        for question, answer in turns:
            if IMAGE_TOKEN in question and not interleaved:
                question = f"{IMAGE_TOKEN}\n{question.replace(IMAGE_TOKEN, '').strip()}".strip()
            text += f"USER: {question}"
            if answer is None:
                text += self.separator.rstrip()
                continue
            text += self.separator
            start = len(text) - 1  # the separator's last space melts into the first token of the answer
            text += answer + self.eos
            spans.append((start, len(text)))
        return Rendered(text, spans)

    def check(self, tokenizer: Any, masks: MaskMode = "offsets") -> None:
        """UserError if the template cannot be used with this tokenizer or these masks; a warning if not quite."""
        if masks == "reference" and self.reference_masks == "none":
            raise UserError("data.masks: reference has no masks for this template; set data.masks=offsets")
        front, end = added_ids(tokenizer)
        if masks == "reference" and (end or front not in ([], [tokenizer.bos_token_id])):
            names = tokenizer.convert_ids_to_tokens(front + end)
            raise UserError(
                f"data.masks: reference counts on a tokenizer that adds nothing but its BOS to a text; this one adds "
                f"{', '.join(map(repr, names))}; set data.masks=offsets"
            )
        if self.eos:
            self.stop_id(tokenizer)
        if joined := self._joined(tokenizer):
            log.warning(
                "data.template: the tokenizer joins the end of a prompt and the beginning of its answer to one token, "
                "%r, which a prompt alone does not end in, so answers will be worse than the loss says; use a "
                "tokenizer that splits text at white space",
                joined,
            )

    def problem(self, turns: Turns, has_image: bool, listed: int | None = None) -> str | None:
        """What makes these turns unusable with this template, as a sentence; None if nothing does.

        listed: number of images where the record gives a list of them, whose markers have to match it one by one.
        """
        marked = any(IMAGE_TOKEN in question for question, _ in turns)
        if marked and not has_image:
            return f"a question contains {IMAGE_TOKEN} but the record names no image; add 'image' or remove the marker"
        if has_image and not marked and not self.needs_image:
            return f"the record names an image but no question contains {IMAGE_TOKEN}; add the marker or remove 'image'"
        if self.needs_image and not has_image:
            return "the record names no image, which this template needs; add 'image' or choose another template"
        markers = sum(question.count(IMAGE_TOKEN) for question, _ in turns)
        if listed is not None and listed != markers:
            return f"the record lists {listed} images but its questions hold {markers} {IMAGE_TOKEN}; make them agree"
        for number, (_, answer) in enumerate(turns):
            for literal in (IMAGE_TOKEN, self.separator, self.eos):
                if literal.strip() and literal in (answer or ""):
                    return f"answer {number} contains the template's own {literal!r}; rewrite or remove it"
        return None

    def encode(
        self,
        conversations: Sequence[Conversation],
        tokenizer: Any,
        turns: TurnMode = "conversation",
        masks: MaskMode = "offsets",
        interleaved: Sequence[bool] | None = None,
    ) -> list[list[Segment]]:
        """Samples as segments, all tokenized in one call.

        conversation: one segment a sample. independent: every turn sees only the system text and the images shown up to
        it, those of earlier turns at its front; several turns that begin with the same images become a prefix segment
        and one segment a turn that shares it, each with exactly the tokens of the single-turn sample.
        interleaved: for each conversation whether its images are a list (see ``render``); None: none of them is.
        DataError for messages that do not pair up or that the template cannot show, and with masks "offsets" for an
        answer that the tokenizer loses characters of, or that does not end in the one end token.
        """
        flags = interleaved if interleaved is not None else [False] * len(conversations)
        samples = [self._units(turns_of(c), turns, flag) for c, flag in zip(conversations, flags, strict=True)]
        units = [unit for sample in samples for unit in sample]
        rendered = [self.render(unit.turns, tokenizer, unit.interleaved) for unit in units]
        encoded = self._encode_rendered(rendered, tokenizer)
        if masks == "reference":
            segments = [self._as_reference(*pair, tokenizer) for pair in zip(rendered, encoded, strict=True)]
        else:
            end = self.end_id(tokenizer)
            for unit, item, one in zip(units, rendered, encoded, strict=True):
                self._check_answers(unit, item, one, end)
            segments = [one.segment for one in encoded]
        each = iter(segments)
        return [_share([_numbered(next(each), unit.images) for unit in sample]) for sample in samples]

    def prompt_batch(
        self, conversations: Sequence[Conversation], tokenizer: Any, interleaved: Sequence[bool] | None = None
    ) -> list[Prompt]:
        """Inference prompts (the last answer None), all tokenized in one call; interleaved as for ``encode``."""
        flags = interleaved if interleaved is not None else [False] * len(conversations)
        pairs = zip(conversations, flags, strict=True)
        rendered = [self.render(turns_of(c), tokenizer, flag) for c, flag in pairs]
        return [Prompt(encoded.segment.ids) for encoded in self._encode_rendered(rendered, tokenizer)]

    def prompt(self, conversation: Conversation, tokenizer: Any) -> Prompt:
        """One inference prompt; see ``prompt_batch``."""
        return self.prompt_batch([conversation], tokenizer)[0]

    def stop_id(self, tokenizer: Any) -> int:
        """Id of the token that ends an answer. UserError if this tokenizer has no such token."""
        end = self.eos or tokenizer.eos_token or ""
        with named_errors(tokenizer):
            ids = tokenizer.encode(end, add_special_tokens=False)
        unknown = ids == [tokenizer.unk_token_id] and end != tokenizer.unk_token
        if len(ids) != 1 or unknown:
            found = "unknown to" if unknown else f"{len(ids)} tokens of"
            raise UserError(
                f"data.template: it ends answers with {end!r}, which is {found} this tokenizer "
                f"(its own end token is {tokenizer.eos_token!r}); choose the template whose end token it is"
            )
        return int(ids[0])

    def end_id(self, tokenizer: Any) -> int | None:
        """Id of the token that every answer of a sample has to end in; None: this template learns no end."""
        return self.stop_id(tokenizer) if self.eos else None

    def _joined(self, tokenizer: Any) -> str | None:
        """The token that a prompt ends in only where its answer follows; None: there is none, as it should be."""
        question = f"{IMAGE_TOKEN}\nwhat is it"
        try:
            [[sample]] = self.encode([[(question, "red")]], tokenizer)
            prompt = self.prompt([(question, None)], tokenizer).ids
        except UserError:
            return None  # said of the first record that it is true of
        pairs = zip(prompt, sample.ids, strict=False)
        other = next((theirs for ours, theirs in pairs if ours != theirs), None)
        return None if other is None else str(tokenizer.convert_ids_to_tokens(other))

    def _units(self, turns: list[tuple[str, str | None]], mode: TurnMode, interleaved: bool) -> list[_Unit]:
        """What is rendered on its own: the whole conversation, or every turn with the images put before its question.

        One image: all turns are about it. A list: a turn sees its own images and those of the turns before it.
        """
        if mode == "conversation" or len(turns) == 1:
            count = sum(question.count(IMAGE_TOKEN) for question, _ in turns)
            return [_Unit(turns, interleaved, tuple(range(count)) if interleaved else ())]
        marker, seen = f"{IMAGE_TOKEN}\n", 0
        if not interleaved:
            marker = marker if any(IMAGE_TOKEN in question for question, _ in turns) else ""
            return [_Unit([(marker + question, answer)], first=n) for n, (question, answer) in enumerate(turns)]
        units = []
        for number, (question, answer) in enumerate(turns):
            before, seen = seen, seen + question.count(IMAGE_TOKEN)
            units.append(_Unit([(marker * before + question, answer)], True, tuple(range(seen)), number))
        return units

    def _encode_rendered(self, rendered: list[Rendered], tokenizer: Any) -> list[_Encoded]:
        texts = [r.text.split(IMAGE_TOKEN) for r in rendered]
        encodings = encode_pieces(tokenizer, [piece for pieces in texts for piece in pieces])
        front = added_ids(tokenizer)[0] if self.adds_special_tokens else []
        greedy = {number for number, token in tokenizer.added_tokens_decoder.items() if token.rstrip}
        pairs = zip(rendered, texts, strict=True)
        return [_join(item, pieces, [encodings[piece] for piece in pieces], front, greedy) for item, pieces in pairs]

    def _as_reference(self, item: Rendered, encoded: _Encoded, tokenizer: Any) -> Segment:
        from tinyllava_fast.data.templates.reference import reference_spans

        ids = encoded.segment.ids
        return Segment(ids, reference_spans(self, tokenizer, item.text, ids))

    def _check_answers(self, unit: _Unit, item: Rendered, encoded: _Encoded, end: int | None) -> None:
        """Raise DataError if something of an answer would not be learnt: some of its characters, or its end token."""
        for number, (start, stop) in enumerate(item.spans):
            text, lost = item.text[start:stop], encoded.lost.get(number)
            if lost:
                raise DataError(
                    f"{self._answer(unit, number, text)}: the tokenizer makes no token of {lost!r}, which would not be "
                    "learnt; remove it, or use a tokenizer that knows it"
                )
            if end is None:
                continue
            learnt = encoded.learnt(number)
            wanted = text.count(self.eos) if self.eos else 1
            if learnt[-1:] != [end] or learnt.count(end) != wanted:
                raise DataError(
                    f"{self._answer(unit, number, text)}: with this tokenizer it would not end in one end token "
                    f"(id {end}); make the end token a special token of the tokenizer, or choose another data.template"
                )

    def _answer(self, unit: _Unit, number: int, text: str) -> str:
        """How an error names an answer."""
        return f"answer {unit.first + number} ({shown(text.strip().removesuffix(self.eos))})"


def _numbered(segment: Segment, images: tuple[int, ...]) -> Segment:
    return replace(segment, images=images) if images else segment


def _share(units: list[Segment]) -> list[Segment]:
    """Several units that begin with the same tokens and images share everything up to the last of those images."""
    first = units[0]
    for cut in [i + 1 for i, token in enumerate(first.ids) if token == IMAGE_INDEX][::-1] if len(units) > 1 else []:
        head = first.ids[:cut]
        images = first.images[: head.count(IMAGE_INDEX)]
        # A prefix carries no label, and the first token after it none either: nothing in the segment predicts it.
        if all(
            unit.ids[:cut] == head
            and unit.images[: len(images)] == images
            and all(start > cut for start, _ in unit.spans)
            for unit in units
        ):
            return [Segment(head, images=images), *(_tail(unit, cut, len(images)) for unit in units)]
    return units


def _tail(unit: Segment, cut: int, images: int) -> Segment:
    """The unit without its first ``cut`` tokens, which it shares."""
    spans = [(start - cut, stop - cut) for start, stop in unit.spans]
    return Segment(unit.ids[cut:], spans, on_prefix=True, images=unit.images[images:])


@dataclass(frozen=True)
class _Encoded:
    """A rendered prompt as tokens, and what became of its ranges of characters."""

    segment: Segment
    ranges: list[int]
    """Number of the range that each span of the segment belongs to: it has one for each piece that it reaches into."""
    lost: dict[int, str]
    """Characters of a range that no token shows, where there are any."""

    def learnt(self, number: int) -> list[int]:
        """Supervised ids of a range."""
        pairs = zip(self.ranges, self.segment.spans, strict=True)
        return [i for n, (start, stop) in pairs if n == number for i in self.segment.ids[start:stop]]


def _join(
    item: Rendered, pieces: list[str], encodings: list[Encoding], front: list[int], greedy: Container[int]
) -> _Encoded:
    """Concatenate the pieces with one marker an image between them, behind the ids that stand before every text."""
    ids, spans, numbers, lost = list(front), [], [], {}
    begin = 0
    for number, (piece, encoding) in enumerate(zip(pieces, encodings, strict=True)):
        if number:
            ids.append(IMAGE_INDEX)
        ranges = [
            (n, max(start - begin, 0), min(stop - begin, len(piece))) for n, (start, stop) in enumerate(item.spans)
        ]
        ranges = [(n, start, stop) for n, start, stop in ranges if start < stop]
        offsets = Offsets(encoding.offsets if ranges else [])
        for n, start, stop in ranges:
            if missing := offsets.lost(piece, start, stop):
                lost[n] = missing
            if (span := offsets.span(start, stop)) is not None:
                # a token of the prompt that swallows white space behind it, as that of an answer, is not learnt
                first = span[0] + (encoding.ids[span[0]] in greedy and encoding.offsets[span[0]][0] < start)
                spans.append((first + len(ids), span[1] + len(ids)))
                numbers.append(n)
        ids += encoding.ids
        begin += len(piece) + len(IMAGE_TOKEN)
    return _Encoded(Segment(ids, spans), numbers, lost)


TEMPLATES: Registry[Template] = Registry("chat template", "tinyllava_fast.data.templates")
