"""Chat templates: messages to token ids, with the positions that carry a label.

A prompt is cut at ``<image>`` and every piece is tokenized by a call of its own, as the reference does, so the text
after an image has the same ids whatever came before it. Of the tokens that a tokenizer adds to every text, a prompt has
those that stand before it, once; an end token comes from the template alone. Which tokens are supervised follows from
character offsets: those that reach into the space before an answer, the answer, or the end-of-answer string.

A template is one file in this folder; the registry finds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, cast

from tinyllava_fast.data.templates._pieces import Encoded, Rendered, added_ids, encode_texts, named_errors
from tinyllava_fast.data.types import IGNORE_INDEX, IMAGE_INDEX, IMAGE_TOKEN
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.fields import shown
from tinyllava_fast.log import log
from tinyllava_fast.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str | None]  # {"from": "human" | "gpt", "value": str | None}
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
    """Number of the record's image that each marker stands for; empty: all for its only one."""

    def labels(self) -> list[int]:
        """Return one label a token, not shifted: the id where supervised, -100 elsewhere and at images."""
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
class _Unit:
    """Turns that are rendered together, and the image of each marker (see Segment.images) where a record lists them."""

    turns: Turns
    interleaved: bool = False
    images: tuple[int, ...] = ()
    first: int = 0
    """Number of its first turn in the conversation."""


def turns_of(conversation: Conversation) -> list[tuple[str, str | None]]:
    """Return messages as (question, answer) pairs, a leading answer left out. DataError if they do not pair up."""
    if not conversation or isinstance(conversation[0], tuple):
        return list(cast(Turns, conversation))
    return paired([(message["from"], message["value"]) for message in cast(Sequence[Message], conversation)])


def paired(said: Sequence[tuple[str | None, str | None]]) -> list[tuple[str, str | None]]:
    """Return (role, text) of messages as (question, answer) pairs, as ``turns_of`` does. The roles take turns."""
    values = [text for _, text in said[said[0][0] != "human" :]]
    questions, answers = cast(list[str], values[0::2]), values[1::2]
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
    """Rule of the reference's label masks (``masks: reference``); none: it has no such template."""
    needs_image: bool = False
    """Every sample gets an image slot, whether its question names one or not."""
    adds_special_tokens: bool = True
    """A prompt begins with what the tokenizer puts before a text, its BOS; False: the rendered text carries its own."""
    shows_questions: bool = True
    """A prompt holds the text of the questions."""

    def with_system(self, system: str) -> Template:
        """Return the template with another system text. UserError if it has no place for one."""
        return replace(self, system=system)

    def render(self, turns: Turns, tokenizer: PreTrainedTokenizerBase | None, interleaved: bool = False) -> Rendered:
        """Return the prompt text of the turns; an answer of None ends the text where the model continues.

        tokenizer: for templates that are the tokenizer's own; the others need none. interleaved: markers stand for the
        images of a list and stay where they are. Otherwise there is one image, and
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

    def check(self, tokenizer: PreTrainedTokenizerBase, masks: MaskMode = "offsets") -> None:
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
        """Return why these turns are unusable with this template, as a sentence; None if they are usable.

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
        tokenizer: PreTrainedTokenizerBase,
        turns: TurnMode = "conversation",
        masks: MaskMode = "offsets",
        interleaved: Sequence[bool] | None = None,
    ) -> list[list[Segment]]:
        """Return samples as segments, all tokenized in one call.

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
        encoded = encode_texts(tokenizer, rendered, with_front=self.adds_special_tokens)
        if masks == "reference":
            segments = [self._as_reference(*pair, tokenizer) for pair in zip(rendered, encoded, strict=True)]
        else:
            end = self.end_id(tokenizer)
            for unit, item, one in zip(units, rendered, encoded, strict=True):
                self._check_answers(unit, item, one, end)
            segments = [Segment(one.ids, one.spans) for one in encoded]
        each = iter(segments)
        return [_share([_numbered(next(each), unit.images) for unit in sample]) for sample in samples]

    def prompt_batch(
        self,
        conversations: Sequence[Conversation],
        tokenizer: PreTrainedTokenizerBase,
        interleaved: Sequence[bool] | None = None,
    ) -> list[Prompt]:
        """Return inference prompts (the last answer None), all tokenized in one call; interleaved as for ``encode``."""
        flags = interleaved if interleaved is not None else [False] * len(conversations)
        pairs = zip(conversations, flags, strict=True)
        rendered = [self.render(turns_of(c), tokenizer, flag) for c, flag in pairs]
        encoded = encode_texts(tokenizer, rendered, with_front=self.adds_special_tokens)
        return [Prompt(one.ids) for one in encoded]

    def prompt(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """Return one inference prompt; see ``prompt_batch``."""
        return self.prompt_batch([conversation], tokenizer)[0]

    def stop_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return the id of the token that ends an answer. UserError if this tokenizer has no such token."""
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

    def end_id(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """Return the id of the token that every answer must end in; None: this template learns no end."""
        return self.stop_id(tokenizer) if self.eos else None

    def _joined(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """Return the token that a prompt ends in only where its answer follows; None, as it should be, without one."""
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
        """Return the units rendered on their own: the whole conversation, or each turn with the images before it.

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

    def _as_reference(self, item: Rendered, encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> Segment:
        from tinyllava_fast.data.templates.reference import reference_spans

        return Segment(encoded.ids, reference_spans(self, tokenizer, item.text, encoded.ids))

    def _check_answers(self, unit: _Unit, item: Rendered, encoded: Encoded, end: int | None) -> None:
        """Raise DataError if something of an answer would not be learnt: some of its characters, or its end token."""
        for number, (start, stop) in enumerate(item.spans):
            text, lost, learnt = item.text[start:stop], encoded.lost[number], encoded.learnt[number]
            if lost:
                raise DataError(
                    f"{self._answer(unit, number, text)}: the tokenizer makes no token of {lost!r}, which would not be "
                    "learnt; remove it, or use a tokenizer that knows it"
                )
            if end is None:
                continue
            wanted = text.count(self.eos) if self.eos else 1
            if learnt[-1:] != [end] or learnt.count(end) != wanted:
                raise DataError(
                    f"{self._answer(unit, number, text)}: with this tokenizer it would not end in one end token "
                    f"(id {end}); make the end token a special token of the tokenizer, or choose another data.template"
                )

    def _answer(self, unit: _Unit, number: int, text: str) -> str:
        """Return the name of an answer in an error."""
        return f"answer {unit.first + number} ({shown(text.strip().removesuffix(self.eos))})"


def _numbered(segment: Segment, images: tuple[int, ...]) -> Segment:
    return replace(segment, images=images) if images else segment


def _share(units: list[Segment]) -> list[Segment]:
    """Let units that begin with the same tokens and images share everything up to the last of those images."""
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
    """Return the unit without its first ``cut`` tokens, which it shares."""
    spans = [(start - cut, stop - cut) for start, stop in unit.spans]
    return Segment(unit.ids[cut:], spans, on_prefix=True, images=unit.images[images:])


TEMPLATES: Registry[Template] = Registry("chat template", "tinyllava_fast.data.templates")
