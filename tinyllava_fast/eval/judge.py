"""A language model as judge, behind any endpoint that speaks OpenAI's chat completions, and a file of its grades.

Grades are appended to a JSONL file as they come, keyed by everything that a grade depends on, so a run that was killed
or whose endpoint went away goes on where it was and a changed answer is graded anew.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from tinyllava_fast.client.endpoint import Endpoint, EndpointError, RefusedError
from tinyllava_fast.errors import DataError, UserError, writing
from tinyllava_fast.fields import Fields, read_jsonl
from tinyllava_fast.log import log

RETRY = "Predict the correctness of the answer (digit): "
RETRIES = 5


class JudgeError(UserError):
    """The endpoint gave no usable reply; grades already made are kept."""


@dataclass(frozen=True)
class Judge(Endpoint):
    """An endpoint that grades. max_tokens: of a reply; 0 leaves the limit to the server."""

    max_tokens: int = 3

    def complete(self, message: str, temperature: float) -> tuple[str, str]:
        """(reply, the model's name as the server gives it) to one user message. Raises JudgeError."""
        body: dict[str, object] = {"temperature": temperature, "messages": [{"role": "user", "content": message}]}
        if self.max_tokens:
            body["max_tokens"] = self.max_tokens
        try:
            reply = self.chat(body)
        except RefusedError as error:
            raise JudgeError(
                f"judge {self.url} refused the request ({error.reason}); check the base URL, the model's name and the "
                "key"
            ) from None
        except EndpointError as error:
            raise JudgeError(f"judge {error}") from None
        return reply.text, reply.model


@dataclass(frozen=True, kw_only=True)
class Grade:
    """One judgement. model: as the server names it. content: the reply that gave the score, up to its first space."""

    id: str
    run: int
    model: str
    content: str
    score: float


def ask(judge: Judge, message: str, id: str, run: int) -> Grade:
    """Have a message graded between 0 and 1, as MM-Vet's evaluator does.

    A reply that is no number there is asked for again up to five times, at rising temperature, then counts as 0.
    Unlike there, "nan" is no number. Raises JudgeError.
    """
    content, model = judge.complete(message, 0.0)
    for retry in range(RETRIES):
        number = content.split(" ")[0].strip()
        score = _number(number)
        if score is not None:
            return Grade(id=id, run=run, model=model, content=number, score=score)
        content, model = judge.complete(f"{message}\n{RETRY}", 0.5 * retry)
    log.warning("judge: no number for %s in %d replies, the last %r; it scores 0", id, RETRIES + 1, content)
    return Grade(id=id, run=run, model=model, content=content, score=0.0)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and 0 <= value <= 1 else None


class GradeFile:
    """Grades as they come, one JSON object a line: {"key", "id", "run", "model", "content", "score"}."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.grades: dict[str, Grade] = {}
        if path.exists():
            self._read()

    def add(self, key: str, grade: Grade) -> None:
        """Append a grade; it is in the file when this returns."""
        self.grades[key] = grade
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **asdict(grade)}) + "\n")

    def _read(self) -> None:
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):  # a kill cut the last line off
            with self.path.open("r+b") as file:
                file.truncate(end)
        try:
            for _, record in read_jsonl(self.path):
                self.grades[record.text("key")] = _grade(record)
        except DataError as error:
            raise DataError(f"{error}: not a grade; mend the line, or delete the file to grade anew") from None


def _grade(record: Fields) -> Grade:
    score = record.number("score", least=0)
    if score > 1:
        record.fail("score", "a number of at most 1", score)
    return Grade(
        id=record.text("id"),
        run=record.integer("run", least=0),
        model=record.text("model", empty=True),
        content=record.text("content", empty=True),
        score=score,
    )


def grade_key(judge: Judge, message: str, run: int) -> str:
    """Return a digest of all that a grade depends on: the judge, the message and the number of the run."""
    return hashlib.sha256(f"{judge.model}\0{run}\0{message}".encode()).hexdigest()[:32]


def grade_all(
    judge: Judge, messages: Mapping[str, str], runs: int, file: GradeFile, *, parallel: int = 4
) -> Iterable[str]:
    """Grade every message (id -> text) ``runs`` times, but for those in the file; yield the id of each new grade.

    A run begins when the one before it is complete. Raises JudgeError when the endpoint fails for good: requests under
    way are waited for and kept, the rest isn't sent.
    """
    for run in range(runs):
        keys = {id: grade_key(judge, message, run) for id, message in messages.items()}
        todo = {id: key for id, key in keys.items() if key not in file.grades}
        failure: JudgeError | None = None
        with ThreadPoolExecutor(parallel) as pool:
            futures = {pool.submit(ask, judge, messages[id], id, run): key for id, key in todo.items()}
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                try:
                    grade = future.result()
                except JudgeError as error:
                    failure = failure or error
                    for other in futures:
                        other.cancel()
                else:
                    file.add(futures[future], grade)
                    yield grade.id
        if failure is not None:
            raise failure
