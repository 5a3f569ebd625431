"""A conversation with a model: what was said, which images it is about, and the commands that change both."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tinyllava_fast.data.types import IMAGE_TOKEN
from tinyllava_fast.errors import UserError, nearest, writing
from tinyllava_fast.files import write_file
from tinyllava_fast.infer.partners import Partner, Show, Talk
from tinyllava_fast.infer.types import SETTINGS, Sampling
from tinyllava_fast.log import log
from tinyllava_fast.paths import expand_home

COMMANDS = {
    "/help": "list the commands",
    "/image FILE ...": "begin a new conversation about these images; without FILE: about none",
    "/system TEXT": "begin a new conversation under this system text; without TEXT: under the model's own",
    "/reset": "begin a new conversation about the same images",
    "/retry": "ask the last question again, with another seed",
    "/set NAME VALUE": "change a setting of the answers; without a name: show them",
    "/save FILE": "write the conversation as a record that can be trained on (JSON)",
    "/quit": "leave; so do quit, exit and Ctrl-D. Ctrl-C stops an answer, pressed twice at the prompt it leaves",
}
_NAMES = [name.partition(" ")[0] for name in COMMANDS]
_COMMAND = re.compile(r"/[a-z]+(?=\s|$)")  # a path such as /etc/hosts is a question


class Conversation:
    """Questions and answers that build on each other.

    partner: who answers. images: files that the whole conversation is about, shown in front of its first question.
    show: takes each piece of an answer as it comes. system: text in place of the model's own. Questions and answers are
    literal: nothing in them is a marker or a control token. Raises DataError for an image that cannot be read,
    UserError for a system text that the partner does not take.
    """

    def __init__(
        self, partner: Partner, images: Sequence[str], sampling: Sampling, show: Show, system: str | None = None
    ) -> None:
        self.partner = partner
        self.sampling = sampling
        self.show = show
        self.turns: list[tuple[str, str]] = []
        self.images = self._readable(images)
        self.system = self._taken(system)
        self._last: tuple[str, int] | None = None  # the last question, and how many turns were before it
        self._tries = 0
        self._saved: set[Path] = set()
        self._explained = False

    def ask(self, line: str) -> str:
        """The answer to a question, or with /retry to the last one, shown piece by piece, remembered with its question.

        Raises UserError if the question cannot be answered, for instance because the conversation no longer fits the
        model's context; the question is then forgotten, as it is after a KeyboardInterrupt, but for /retry.
        """
        if _name(line) == "/retry":
            question, before = self._again()
        else:
            question, before, self._tries = line.strip(), len(self.turns), 0
        self._last = question, before
        turns = self.turns[:before]
        sampling = replace(self.sampling, seed=self.sampling.seed + self._tries)
        talk = Talk(question=question, turns=turns, images=self.images, system=self.system, sampling=sampling)
        answer = self.partner.answer(talk, self.show)
        self.show("\n")
        self.turns = [*turns, (question, answer)]
        return answer

    def command(self, line: str) -> str | None:
        """Carry out a command and return what to tell the user; None if the line is for ``ask``.

        Raises UserError for an unknown command, and for one that cannot be carried out.
        """
        name = _name(line)
        if name is None or name == "/retry":
            return None
        rest = line[len(name) :].strip()
        if name == "/help":
            return "\n".join(f"  {usage:<16} {meaning}" for usage, meaning in COMMANDS.items())
        if name == "/set":
            return self._set(rest)
        if name == "/save":
            return self._save(rest)
        if name == "/image":
            self.images = self._readable(_words(rest))
        elif name == "/system":
            self.system = self._taken(rest or None)
        elif name != "/reset":
            close = get_close_matches(name, _NAMES, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"{name}: unknown command; {hint}/help lists them, a space in front makes it a question")
        self.turns, self._last, self._explained = [], None, False
        return f"a new conversation: {self.about()}"

    def about(self) -> str:
        """The images in words."""
        if not self.images:
            return "about no image (/image FILE shows one)"
        return f"about {', '.join(self.images)}"

    def explain(self, error: UserError) -> str:
        """The error, and how to go on where the conversation itself may be what no longer fits; said once."""
        if not self.turns or self._explained:
            return str(error)
        self._explained = True
        return f"{error}. /reset begins a new conversation, which has the whole context to itself"

    def _again(self) -> tuple[str, int]:
        if self._last is None:
            raise UserError("/retry: no question was asked yet; type one")
        self._tries += 1
        if not self.sampling.temperature:
            log.info("the temperature is 0, so the answer is the same one; /set temperature 0.7 makes others")
        return self._last

    def _set(self, rest: str) -> str:
        name, _, text = rest.partition(" ")
        if name and name not in SETTINGS:
            raise UserError(f"/set: unknown setting {name!r}; {nearest(name, SETTINGS)}")
        if name:
            try:
                changed: dict[str, Any] = {name: SETTINGS[name](text)}
                self.sampling = replace(self.sampling, **changed)
            except ValueError as error:
                kind = "a whole number" if SETTINGS[name] is int else "a number"
                said = str(error) if str(error).startswith(name) else f"{name} {text.strip()!r} is not {kind}"
                raise UserError(f"/set: {said}") from None
        return "\n".join(f"  {one:<20} {getattr(self.sampling, one)}" for one in SETTINGS if name in ("", one))

    def _save(self, rest: str) -> str:
        """Write the record; its own fields are those of a training record, the others say how it came about."""
        if not rest or not self.turns:
            raise UserError("/save: " + ("name a file" if not rest else "nothing was answered yet; ask a question"))
        path = Path(expand_home(rest))
        if path.resolve() not in self._saved and os.path.lexists(path):
            raise UserError(f"/save: {path} is there already; name another file")
        if any(IMAGE_TOKEN in text for turn in self.turns for text in turn):
            raise UserError(f"/save: a text here holds {IMAGE_TOKEN}, which a record takes for an image")
        images = [os.path.abspath(image) for image in self.images]
        values = [text for turn in self.turns for text in turn]
        values[0] = f"{IMAGE_TOKEN}\n" * len(images) + values[0]
        messages = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
        record = {
            **({"image": images if len(images) > 1 else images[0]} if images else {}),
            "conversations": messages,
            "model": self.partner.name,
            "system": self.system,
            "settings": {name: getattr(self.sampling, name) for name in SETTINGS},
        }
        with writing(path):
            write_file(path, (json.dumps([record], indent=2) + "\n").encode())
        self._saved.add(path.resolve())
        return f"saved: {path}"

    def _taken(self, system: str | None) -> str | None:
        if system is not None:
            self.partner.check_system(system)
        return system

    def _readable(self, images: Sequence[str]) -> list[str]:
        """The paths, each of which was opened once, so that a mistake is said before the first question."""
        paths = [expand_home(path) for path in images]
        for path in paths:
            self.partner.check_image(path)
        return paths


def _name(line: str) -> str | None:
    """The command that a line begins with; None for a question."""
    found = _COMMAND.match(line)
    return found.group() if found else None


def _words(text: str) -> list[str]:
    """Paths out of a line, in quotes where they hold spaces; a whole line that is a file is one path."""
    if os.path.isfile(os.path.expanduser(text)):
        return [text]
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"/image {text}: {error}; close the quotes") from None
