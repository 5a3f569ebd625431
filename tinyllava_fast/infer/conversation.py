"""A conversation with a model: what was said, which images it is about, and the commands that change both."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from tinyllava_fast.data.images import load_image
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.assistant import Assistant
from tinyllava_fast.infer.types import Images, Message, Request, Sampling
from tinyllava_fast.paths import expand_home

COMMANDS = {
    "/help": "list the commands",
    "/image FILE ...": "begin a new conversation about these images; without FILE: about none",
    "/reset": "begin a new conversation about the same images",
    "/quit": "leave; so do quit, exit and Ctrl-D. Ctrl-C stops an answer, pressed twice at the prompt it leaves",
}
_NAMES = [name.partition(" ")[0] for name in COMMANDS]
_COMMAND = re.compile(r"/[a-z]+(?=\s|$)")  # a path such as /etc/hosts is a question


class Conversation:
    """Questions and answers that build on each other.

    assistant: the model. images: files that the whole conversation is about, shown in front of its first question.
    show: takes each piece of an answer as it comes. Questions and answers are literal: nothing in them is a marker or a
    control token. Raises DataError for an image that cannot be read.
    """

    def __init__(
        self, assistant: Assistant, images: Sequence[str], sampling: Sampling, show: Callable[[str], None]
    ) -> None:
        self.assistant = assistant
        self.sampling = sampling
        self.show = show
        self.said: list[Message] = []
        self.images = self._readable(images)
        self._explained = False

    def ask(self, question: str) -> str:
        """The answer, shown piece by piece, remembered with its question.

        Raises UserError if the question cannot be answered, for instance because the conversation no longer fits the
        model's context; the question is then forgotten, as it is after a KeyboardInterrupt.
        """
        messages = [*self.said, {"from": "human", "value": [question]}]
        image: Images | None = list(self.images) if len(self.images) > 1 else next(iter(self.images), None)
        request = Request(messages=messages, image=image, sampling=self.sampling)
        answer = self.assistant.engine.answer(request, on_token=lambda _, piece: self.show(piece))
        self.show("\n")
        self.said = [*messages, {"from": "gpt", "value": [answer.text]}]
        return answer.text

    def command(self, line: str) -> str | None:
        """Carry out a command and return what to tell the user; None if the line is a question.

        Raises UserError for an unknown command, or an image that cannot be read.
        """
        found = _COMMAND.match(line)
        if found is None:
            return None
        name, rest = found.group(), line[found.end() :]
        if name == "/help":
            return "\n".join(f"  {usage:<16} {meaning}" for usage, meaning in COMMANDS.items())
        if name == "/image":
            self.images = self._readable(_words(rest))
        elif name != "/reset":
            close = get_close_matches(name, _NAMES, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"{name}: unknown command; {hint}/help lists them, a space in front makes it a question")
        self.said, self._explained = [], False
        return f"a new conversation: {self.about()}"

    def about(self) -> str:
        """The images in words."""
        if not self.images:
            return "about no image (/image FILE shows one)"
        return f"about {', '.join(self.images)}"

    def explain(self, error: UserError) -> str:
        """The error, and how to go on where the conversation itself may be what no longer fits; said once."""
        if not self.said or self._explained:
            return str(error)
        self._explained = True
        return f"{error}. /reset begins a new conversation, which has the whole context to itself"

    def _readable(self, images: Sequence[str]) -> list[str]:
        """The paths, each of which was opened once, so that a mistake is said before the first question."""
        paths = [expand_home(path) for path in images]
        for path in paths:
            load_image(path, self.assistant.engine.lmm.config.reading)
        return paths


def _words(text: str) -> list[str]:
    """Paths out of a line, in quotes where they hold spaces; a whole line that is a file is one path."""
    if os.path.isfile(os.path.expanduser(text.strip())):
        return [text.strip()]
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"/image {text.strip()}: {error}; close the quotes") from None
