"""The form that an answer must have: a JSON schema, any JSON object, a regular expression, or one of some texts.

llguidance compiles it and tells before each token which ones may follow.

Legend: R answers, V vocabulary, B bytes of V bits.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tinyllava_fast.errors import UserError, import_optional
from tinyllava_fast.fields import DECODER, fault, is_text, shown

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

MOST_CHARACTERS = 65_536
"""Most characters of a schema, a regular expression, or all choices together."""
MOST_DEPTH = 32
"""Most lists and objects around one another in a schema."""
MOST_COMPILED = 64  # grammars that a compiler keeps
# The most that one step of an answer may cost: 50 ms, and 50 MB. A long text without choice is the dearest.
_LIMITS = {"max_lexer_states": 50_000, "step_lexer_fuel": 100_000, "verbose_errors": False}

_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")  # in a text that no user has written

# What llguidance takes beside the schema. White space that a model is free to choose may never end.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Grammar:
    """The form of an answer, for ``Sampling.grammar``. Made by the functions below; not compiled yet.

    UserError of each: for what is no JSON, no text, too long or nested too deep. What a compiler finds wrong comes with
    the request.
    """

    kind: Literal["json schema", "regex", "choice"]
    text: str

    @staticmethod
    def json_schema(schema: dict[str, Any] | str) -> Grammar:
        """Answers that are JSON of this schema, a decoded one or its text, on one line with ", " and ": " between."""
        if isinstance(schema, str):
            schema = _decoded(schema)
        if not isinstance(schema, dict):
            raise UserError(f"json schema: expected an object, got {shown(schema)}")
        _check_depth(schema)
        try:
            text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"json schema: not JSON ({error}); mend it") from None
        return Grammar("json schema", _checked("json schema", text))

    @staticmethod
    def json_object() -> Grammar:
        """Answers that are any JSON object."""
        return Grammar.json_schema({"type": "object"})

    @staticmethod
    def regex(pattern: str) -> Grammar:
        """Answers that a regular expression matches from end to end; Rust's syntax, without look-around.

        A digit and a word character are ASCII's.
        """
        return Grammar("regex", _checked("regex", pattern))

    @staticmethod
    def choice(options: Sequence[str]) -> Grammar:
        """Answers that are one of some texts."""
        if isinstance(options, str) or not options or not all(isinstance(o, str) and o for o in options):
            raise UserError(f"choice: expected a list of texts that are not empty, got {shown(options)}")
        return Grammar("choice", _checked("choice", json.dumps(list(options), ensure_ascii=False)))


def _checked(kind: str, text: str) -> str:
    """Return the text. UserError if it is none, or too long."""
    if not isinstance(text, str) or not is_text(text) or "\0" in text:
        raise UserError(f"{kind}: {shown(text)} is no text that can be written; mend it")
    _check_length(kind, len(text))
    return text


def _decoded(text: str) -> Any:
    _check_length("json schema", len(text))
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"json schema: {fault(error, text)}") from None


def _check_length(kind: str, length: int) -> None:
    if length > MOST_CHARACTERS:
        raise UserError(f"{kind}: it has {length} characters, and {MOST_CHARACTERS} are the most; shorten it")


def _check_depth(schema: object) -> None:
    """UserError for a schema that is nested too deep. A compiler of it could run out of stack."""
    level: list[object] = [schema]
    for _ in range(MOST_DEPTH + 1):
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list, tuple)))
        level = list(islice(chain.from_iterable(inner), MOST_CHARACTERS))
        if not level:
            return
    raise UserError(f"json schema: it is nested deeper than {MOST_DEPTH} lists and objects; make it flatter")


class Compiler:
    """Compiles grammars for a tokenizer; each once, as long as it is among the last ones used. For any thread.

    vocab: tokens that may be generated, the first ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab: int) -> None:
        self.tokenizer = tokenizer
        self.vocab = vocab
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = Lock()

    def start(self, grammar: Grammar, ends: Iterable[int]) -> Progress:
        """Return the beginning of an answer. ends: the tokens that end it.

        UserError for a grammar that is wrong, too complex, or met by no text.
        """
        with self._lock:
            matcher = self._compiled.pop(grammar, None)
            if matcher is None:
                matcher = self._compile(grammar)
            self._compiled[grammar] = matcher
            if len(self._compiled) > MOST_COMPILED:
                self._compiled.popitem(last=False)
        return Progress(self, matcher.deep_copy(), frozenset(e for e in ends if e < self.vocab))

    @cached_property
    def executor(self) -> LLExecutor:
        """The threads that compute masks."""
        executor: LLExecutor = _llguidance().LLExecutor()
        return executor

    @cached_property
    def end_ids(self) -> list[int]:
        """The tokens that llguidance takes for the end of a text."""
        return self._tokens.eos_tokens

    @cached_property
    def _tokens(self) -> LLTokenizer:
        """The tokenizer as llguidance reads it, which takes half a second for 49k tokens."""
        _llguidance()
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self.tokenizer, n_vocab=self.vocab)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"grammar: the model's tokenizer cannot be held to one: {error}") from None

    def _compile(self, grammar: Grammar) -> LLMatcher:
        library = _llguidance()
        limits = library.LLParserLimits(**_LIMITS)
        matcher: LLMatcher = library.LLMatcher(self._tokens, _lark(grammar), limits=limits, log_level=0)
        if matcher.is_error():
            raise UserError(f"{grammar.kind}: {_said(matcher.get_error())}")
        probe = matcher.deep_copy()
        probe.consume_tokens(self._tokens.greedy_tokenize(" "))
        probe.compute_bitmask()
        if probe.is_stopped():
            what = "no text but the empty one" if probe.is_accepting() else "no text"
            raise UserError(f"{grammar.kind}: {what} meets it; mend it")
        return matcher


class Progress:
    """The place of one answer in its grammar."""

    def __init__(self, compiler: Compiler, matcher: LLMatcher, ends: frozenset[int]) -> None:
        self.compiler = compiler
        self.matcher = matcher
        self.ends = ends

    def push(self, token: int) -> bool:
        """Take the next token, and return whether nothing may follow it. UserError where the grammar is too complex."""
        if token in self.ends:
            return True
        self.matcher.consume_token(token)
        if not self.matcher.is_stopped():
            return False
        if self.matcher.is_error() or not self.matcher.is_accepting():
            raise self.stuck()
        return True

    def stuck(self) -> UserError:
        """Return the error of a grammar that is too complex, or led to where no text meets it."""
        return UserError(f"the grammar cannot be followed any further: {_said(self.matcher.get_error())}; simplify it")


def allowed_tokens(progresses: Sequence[Progress]) -> tuple[np.ndarray, list[UserError | None]]:
    """Return which tokens may come next, bits [R, B] of uint8, lowest first, and what is wrong with each grammar now.

    An answer may end only where its grammar is complete. progresses: of one compiler, at least one.
    """
    compiler = progresses[0].compiler
    words = np.zeros((len(progresses), (compiler.vocab + 31) // 32), dtype=np.int32)
    matchers = [(p.matcher, row) for row, p in enumerate(progresses)]
    compiler.executor.unsafe_compute_mask_ptr(matchers, words.ctypes.data, words.strides[0], len(words))
    bits = words.view(np.uint8)
    errors: list[UserError | None] = [None] * len(progresses)
    for row, progress in enumerate(progresses):
        _set(bits[row], compiler.end_ids, False)
        _set(bits[row], progress.ends, progress.matcher.is_accepting())
        if progress.matcher.is_error():
            errors[row] = progress.stuck()
        elif not bits[row].any():
            errors[row] = UserError("the model has no token that its grammar allows next; mend the grammar")
        if errors[row] is not None:
            bits[row] = 255  # its numbers stay numbers until the answer has failed
    return bits, errors


def _set(bits: np.ndarray, tokens: Iterable[int], value: bool) -> None:
    for token in tokens:
        bit = 1 << (token & 7)
        bits[token >> 3] = bits[token >> 3] | bit if value else bits[token >> 3] & (255 ^ bit)


def _lark(grammar: Grammar) -> str:
    """Return a grammar as llguidance reads it. A space may go first, as models begin; Answer.text is without it."""
    if grammar.kind == "json schema":
        body = "%json " + json.dumps({**json.loads(grammar.text), "x-guidance": _JSON_STYLE}, ensure_ascii=False)
    elif grammar.kind == "regex":
        body = "/" + _llguidance().regex_to_lark(grammar.text, "dw") + "/"
    else:
        body = " | ".join(json.dumps(option, ensure_ascii=False) for option in json.loads(grammar.text))
    return f'start: " "? body\nbody: {body}'


def _said(message: str) -> str:
    """Return what llguidance says in one line: of a regular expression the fault alone."""
    fault = message.partition("\nerror: ")[2] or _PLACE.sub("", message)
    return fault.strip().partition("\n")[0][:300] or "it is too complex"


def _llguidance() -> Any:
    return import_optional("llguidance", "structured output", "serve")
