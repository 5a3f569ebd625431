"""Guessed tokens: what followed the last tokens of a sequence where they stood before, in its prompt or its answer.

Answers often repeat their question, a text in the prompt, or themselves. A step that takes the newest token and some
guesses tells at once which of them the model would have said; those are kept, so several tokens cost one pass over the
weights (prompt look-up decoding; speculative decoding, Leviathan et al., arXiv:2211.17192, without a second model).
The tokens are those of steps of one: each is chosen from the model's own logits as if the guesses had not been.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary

from tinyllava_fast.infer.scheduling.sequence import Sequence

LENGTHS = (4, 3, 2)  # tokens that are looked up, the longest first
MOST_ROWS = 16  # of a step with guesses: beyond, a row takes as long as a step of its own would
_LONGEST_PAUSE = 32  # steps without guesses after wrong ones


class History:
    """The tokens of one sequence, and where the last ones stood before."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._length = most
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # where the token is that last followed these
        self._pause = self._misses = 0

    def extend(self, tokens: Iterable[int]) -> None:
        """Take further tokens; negative ones are of images."""
        said, after = self._tokens, self._next
        for token in tokens:
            at = len(said)
            for length in LENGTHS:
                if at >= length:
                    after[tuple(said[at - length : at])] = at
            said.append(token)

    def __len__(self) -> int:
        """Return how many tokens it has."""
        return len(self._tokens)

    def guess(self, room: int) -> list[int]:
        """Return at most ``room`` tokens that may come next; none for some time after wrong ones."""
        if self._pause:
            self._pause -= 1
            return []
        said = self._tokens
        at = next((self._next[end] for n in LENGTHS if (end := tuple(said[-n:])) in self._next), None)
        guessed: list[int] = []
        while at is not None and len(guessed) < min(room, self._length):
            place = at + len(guessed)  # what repeats itself goes on into the guess
            token = said[place] if place < len(said) else guessed[place - len(said)]
            if token < 0:
                break
            guessed.append(token)
        return guessed

    def learn(self, guessed: int, right: int) -> None:
        """Adapt to how many of the last guesses were right."""
        if right == 0:
            self._misses += 1
            self._pause = min(2**self._misses, _LONGEST_PAUSE)
            self._length = max(1, self._length // 2)
            return
        self._misses = 0
        self._length = min(self.most, 2 * guessed if right == guessed else right + 1)


class Speculation:
    """Guesses for the sequences of a step.

    tokens: most guesses for one sequence in a step; 0: none. guessed, right: so far.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.guessed = self.right = 0
        self._histories: WeakKeyDictionary[Sequence, History] = WeakKeyDictionary()

    def guess(self, sequences: list[Sequence]) -> dict[Sequence, list[int]]:
        """Return guesses for those sequences that have any. Each has the rows of the pool that they need."""
        takers = [s for s in sequences if s.request.sampling.temperature == 0] if self.tokens else []
        room = (MOST_ROWS - len(sequences)) // max(1, len(takers))
        if room < 1:
            return {}
        found = {}
        for sequence in takers:
            left = sequence.request.sampling.max_new_tokens - len(sequence.tokens) - 1
            rows = sequence.num_reserved_rows - sequence.num_own_cached - 1
            if guesses := self._history(sequence).guess(min(room, left, rows)):
                found[sequence] = guesses
        return found

    def learn(self, guesses: Mapping[Sequence, list[int]], right: Mapping[Sequence, int]) -> None:
        """Note how many guesses of each sequence were right."""
        for sequence, guessed in guesses.items():
            self.guessed += len(guessed)
            self.right += right[sequence]
            self._histories[sequence].learn(len(guessed), right[sequence])

    def _history(self, sequence: Sequence) -> History:
        history = self._histories.get(sequence)
        if history is None:
            history = self._histories[sequence] = History(self.tokens)
            history.extend(sequence.prompt)
        history.extend(sequence.tokens[len(history) - len(sequence.prompt) :])
        return history
