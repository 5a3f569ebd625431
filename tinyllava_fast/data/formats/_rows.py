"""One entry of a file to a Record, whatever its fields are called: LLaVA's, ShareGPT's, OpenAI's, or plain columns.

    conversations or messages    a list of {from, value} or {role, content}; content may be a list of parts
    question, answer             one turn, about the image if there is one
    caption                      an image and its text

Everything is checked strictly: a picture that no known field names, a role that nobody knows, or a message out of turn
would change what is learnt in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import cast

from tinyllava_fast.data.formats._base import Place, Row
from tinyllava_fast.data.pictures import IMAGE_ALIASES
from tinyllava_fast.data.record import FaultError, Record
from tinyllava_fast.data.templates.base import paired
from tinyllava_fast.data.types import IMAGE_TOKEN, ImagePart, laid_out
from tinyllava_fast.errors import DataError
from tinyllava_fast.fields import Fields, is_text, shown

LISTS = ("conversations", "messages")
"""Fields that hold a conversation; the first that is given is read."""
_COLUMNS = ("question", "answer", "caption")
_FIELDS = ("id", "image", "images", "system", *LISTS, *_COLUMNS)
_ROLES = {
    **dict.fromkeys(("human", "user"), "human"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), "gpt"),
    **dict.fromkeys(("system", "developer"), "system"),
}
FORMAT = '{"from": "human" | "gpt", "value": text} or {"role": "user" | "assistant", "content": text or parts}'
_KNOWN_ROLES = "'human' or 'gpt' ('user' or 'assistant'), or 'system' in front"
_Said = tuple[str, str]  # role: human or gpt; text


def record_of(index: int, row: Row) -> Record:
    """Return the record of an entry. FaultError, which names the field but not the place."""
    value = row.values
    if not isinstance(value, dict):
        raise FaultError(f"record: expected an object with 'conversations', got {shown(value)}")
    record = Fields(value, "", FaultError)
    name = value.get("id")
    if name is not None and not (isinstance(name, str) and is_text(name)):
        name = record.word("id")
    images, listed = _images(record, row)
    system = _text(record, "system", value.get("system")) if value.get("system") is not None else ""
    where = next((where for where in LISTS if value.get(where) is not None), "")
    if where:
        pictures = _Pictures(row)
        first, said = _messages(record, where, pictures)
        if system and first:
            raise FaultError(f"system: given beside a system message in {where!r}; keep one of them")
        system = system or first
        if pictures.inside or pictures.open:
            images, listed = pictures.beside(images), True
    else:
        said = _columns(record, len(images) if listed else len(images[:1]))
    try:
        turns = paired(said) if said else []
    except DataError as error:
        raise FaultError(f"{where or 'question'}: {error}") from None
    if not turns:
        raise FaultError(f"{where}: no question; add a 'human' message and its answer")
    pairs = tuple((question, answer or "") for question, answer in turns)
    name = str(index) if name is None else name
    return Record(index, name, row.line, tuple(images), listed, pairs, (system.strip() and system) or None, row.place)


def used_fields(values: Mapping[str, object]) -> set[str]:
    """Return the names of those fields of an entry that ``record_of`` reads."""
    where = next((where for where in LISTS if values.get(where) is not None), "")
    asked = values.get("question") is not None or values.get("answer") is not None
    return {
        "id",
        "image",
        "images",
        "system",
        *([where] if where else ("question", "answer") if asked else ["caption"]),
    }


def _messages(record: Fields, where: str, pictures: _Pictures) -> tuple[str, list[_Said]]:
    """Return the system text, "" without one, and the messages behind it."""
    messages = record.values[where]
    if not isinstance(messages, list) or not messages:
        record.fail(where, f"a list of {FORMAT}, at least one question and one answer", messages)
    system, before, said = "", None, []
    for number, message in enumerate(messages):
        field = f"{where}[{number}]"
        if not isinstance(message, dict):
            record.fail(f"{field}.from", _KNOWN_ROLES, message)
        key = "role" if message.get("from") is None else "from"
        name = message.get(key)
        who = name if name == "human" or name == "gpt" else _role(record, field, key, name)
        key_said = "content" if message.get("value") is None and "content" in message else "value"
        text = message.get(key_said)
        if not isinstance(text, str) or not (text.isascii() or is_text(text)):
            text = pictures.parts(record, f"{field}.{key_said}", who, text, (where, number, key_said))
        if len(message) > 2:
            _refuse_picture_in(record, field, message)
        if who == before:
            raise FaultError(
                f"{field}.{key}: two messages of {name!r} in a row; questions (human) and answers (gpt) must alternate"
            )
        before = who
        if who != "system":
            said.append((who, text))
        elif number:
            raise FaultError(f"{field}.{key}: a system message stands before all others; move or remove it")
        else:
            system = text
    return system, said


def _role(record: Fields, field: str, key: str, name: object) -> str:
    known = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if known is None:
        why = ""
        if name in ("tool", "function", "observation", "function_call"):
            why = "calls of tools cannot be learnt; remove the record"
        record.fail(f"{field}.{key}", _KNOWN_ROLES, name, why)
    return known


def _columns(record: Fields, images: int) -> list[_Said]:
    """Return the turn of a record of columns, a marker for each image put in front if it has none."""
    values = record.values
    if values.get("question") is not None or values.get("answer") is not None:
        question, answer = record.word("question"), _answer(record, "answer")
    elif values.get("caption") is not None:
        question, answer = "", _answer(record, "caption")
        if not images:
            raise FaultError("caption: there is no image that it could be of; add 'image', or name a 'question'")
    else:
        raise FaultError(f"conversations: missing; {_instead_of_conversations(record)}")
    if images and IMAGE_TOKEN not in question:
        question = (f"{IMAGE_TOKEN}\n" * images + question).strip()
    return [("human", question), ("gpt", answer)]


def _answer(record: Fields, name: str) -> str:
    value = record.values.get(name)
    return value if isinstance(value, str) and is_text(value) else record.word(name)


class _Pictures:
    """The images that the messages of a record hold. open: parts that stand for an image which the record lists."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.inside: list[str] = []
        self.open = 0

    def beside(self, images: list[str]) -> list[str]:
        """Return all images in order. FaultError where the record lists some and its messages hold others."""
        if self.inside and (images or self.open):
            raise FaultError("images: given beside images inside the messages; keep one of them")
        return self.inside or images

    def parts(self, record: Fields, field: str, who: str, value: object, place: Place) -> str:
        """Return the text of a message that is a list of parts, a marker for each image in it."""
        if isinstance(value, str):
            raise FaultError(f"{field}: contains half of a surrogate pair; mend it")
        if not isinstance(value, list):
            record.fail(field, "text, or a list of parts", value)
        parts = [self._part(record, f"{field}[{n}]", part, (*place, n)) for n, part in enumerate(value)]
        if who != "human" and ImagePart.IMAGE in parts:
            raise FaultError(f"{field}: holds an image; only questions (human, user) show images")
        return "".join(IMAGE_TOKEN if isinstance(part, ImagePart) else part for part in laid_out(parts))

    def _part(self, record: Fields, field: str, part: object, place: Place) -> str | ImagePart:
        if isinstance(part, str) and is_text(part):
            return part
        if not isinstance(part, dict):
            record.fail(field, 'a part, {"type": "text", "text": ...} or {"type": "image_url", ...}', part)
        kind = part.get("type")
        if kind in ("text", "input_text", "output_text") or (kind is None and part.get("text") is not None):
            return _text(record, f"{field}.text", part.get("text"))
        if kind not in ("image", "image_url", "input_image"):
            record.fail(f"{field}.type", "'text', 'image' or 'image_url'", kind)
        for name in ("image_url", "image", "url", "path"):
            if part.get(name) is not None:
                self.inside.append(self._source(record, f"{field}.{name}", part[name], (*place, name)))
                return ImagePart.IMAGE
        self.open += 1
        return ImagePart.IMAGE

    def _source(self, record: Fields, field: str, value: object, place: Place) -> str:
        if isinstance(value, dict) and value.get("url") is not None:
            return _image(record, f"{field}.url", value["url"], (*place, "url"), self.row)
        return _image(record, field, value, place, self.row)


def _images(record: Fields, row: Row) -> tuple[list[str], bool]:
    """Return the images that the record names beside its messages, and True if they are a list that is not empty.

    FaultError for a field that seems to be a misspelt "image".
    """
    image, images = record.values.get("image"), record.values.get("images")
    if image is not None and images is not None:
        raise FaultError("images: given beside 'image'; keep one of them")
    if images is None and image is None:
        _refuse_misspelt_image(record)
        return [], False
    name, value = ("image", image) if images is None else ("images", images)
    if isinstance(value, list):
        return [_image(record, f"{name}[{n}]", one, (name, n), row) for n, one in enumerate(value)], bool(value)
    if name == "images":
        record.fail(name, "a list of paths", value)
    return [_image(record, name, value, (name,), row)], False


def _image(record: Fields, field: str, value: object, place: Place, row: Row) -> str:
    """Return the path of an image, or a reference to it inside the file."""
    if isinstance(value, str):
        if value.startswith("data:"):
            return row.refer(place)
        return cast(str, Fields({field: value.removeprefix("file://")}, "", FaultError).path(field))
    if value is True and place[0] in row.binary:
        return row.refer(place)
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        if value.get("bytes") is True and place[0] in row.binary:
            return row.refer((*place, "bytes"))
        if value.get("path") is not None:
            return _image(record, f"{field}.path", value["path"], (*place, "path"), row)
        raise FaultError(f"{field}: holds neither 'bytes' nor a 'path'; add one of them, or remove the record")
    record.fail(field, "a path" if place[-1] != "image" else "a path or a list of paths", value)


def _text(record: Fields, field: str, value: object) -> str:
    if not isinstance(value, str):
        record.fail(field, "text", value)
    if not is_text(value):
        raise FaultError(f"{field}: contains half of a surrogate pair; mend it")
    return value


def _refuse_misspelt_image(record: Fields) -> None:
    """Raise for a picture that no known field names: training would leave it out in silence."""
    for name, value in record.values.items():
        if value is None or name in _FIELDS:
            continue
        if name in ("video", "videos"):
            raise FaultError(f"{name}: videos cannot be read; remove this record, or name frames as images")
        if name.lower() in IMAGE_ALIASES or get_close_matches(name.lower(), ("image", "images"), cutoff=0.75):
            raise FaultError(f"unknown field {shown(name)}; did you mean 'image'? Rename it or remove it")


def _refuse_picture_in(record: Fields, field: str, message: Mapping[str, object]) -> None:
    """Raise for a picture that a message names, not the record: training would leave it out in silence."""
    for name, value in message.items():
        if value is not None and name.lower() in ("image", "images", "video", "videos", *IMAGE_ALIASES):
            raise FaultError(
                f"{field}: it names {shown(name)}, which belongs to the record; write it beside the messages, and put "
                "<image> into the question"
            )
    if message.get("tool_calls"):
        raise FaultError(f"{field}.tool_calls: calls of tools cannot be learnt; remove the record")


def _instead_of_conversations(record: Fields) -> str:
    """Return why a record has no conversations, and the remedy."""
    near = get_close_matches("conversations", list(record.values), n=1, cutoff=0.5)
    near = near or get_close_matches("messages", list(record.values), n=1, cutoff=0.6)
    meant = f"did you mean {near[0]!r}? " if near else ""
    has = ", ".join(map(shown, record.values)) or "no field"
    return f"{meant}The record has {has}; 'conversations' or 'messages', a list of {FORMAT}, or 'question' and 'answer'"
