"""Changes that a request asks for in the logits, and the log-probabilities that it is told.

In this order: log-probabilities are noted of the model's own logits; then come the repetition penalty, the presence and
frequency penalties, the bias, the grammar. Temperature, top_k, top_p and min_p follow (sampling.py).

Legend: R sequences, V vocabulary, N single logits that change.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tinyllava_fast.data.tokenizer import largest_id
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.grammar import Compiler, Progress, allowed_tokens
from tinyllava_fast.infer.sampling import next_tokens
from tinyllava_fast.infer.types import Request, Sampling, TokenLogprob


class Shaper:
    """Makes the Shaping of requests to a model with this tokenizer. For any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.vocab = largest_id(tokenizer)[1] + 1
        self._compiler = Compiler(tokenizer, self.vocab)

    def shaping(self, request: Request, prompt: Sequence[int], ends: frozenset[int]) -> Shaping | None:
        """Return what a request asks for; None for nothing.

        prompt: token ids, negative ones of images. ends: tokens that end the answer.
        UserError for a grammar that cannot be compiled, and a bias on a token that there is not.
        """
        sampling = request.sampling
        if sampling.plain:
            return None
        unknown = max(sampling.logit_bias, default=0)
        if unknown >= self.vocab:
            raise UserError(
                f"{request.named}: logit_bias names token {unknown}, but the last one is {self.vocab - 1}; remove it"
            )
        try:
            progress = None if sampling.grammar is None else self._compiler.start(sampling.grammar, ends)
        except UserError as error:
            raise UserError(f"{request.named}: {error}") from None
        return Shaping(request, SingleLogits.of(sampling, prompt, self.vocab), progress)


class Shaping:
    """The changes that one sequence's request asks for, as far as its answer has come.

    It is a function of the prompt and of the tokens pushed, so it stays right when a sequence's K/V are computed anew.
    """

    def __init__(self, request: Request, singles: SingleLogits | None, progress: Progress | None) -> None:
        self.named = request.named
        self.logprobs: list[TokenLogprob] = []
        self.most_logprobs = request.sampling.logprobs
        self.singles = singles
        self.progress = progress
        self.error: UserError | None = None  # why its next token could not be chosen
        self.next_logprob: TokenLogprob | None = None  # of the token that has been chosen and not pushed

    def push(self, token: int) -> bool:
        """Take the token that has been chosen, and return whether the grammar lets nothing follow.

        UserError, naming the request, where its grammar cannot be followed.
        """
        if self.next_logprob is not None:
            self.logprobs.append(self.next_logprob)
        if self.singles is not None:
            self.singles.push(token)
        try:
            if self.error is not None:
                raise self.error
            return self.progress is not None and self.progress.push(token)
        except UserError as error:
            raise UserError(f"{self.named}: {error}") from None


class SingleLogits:
    """The logits of one sequence that penalties and bias change: x becomes (x / factor, or x * factor if x < 0) - less.

    The first ``count`` entries of ids, factors and less [room for all that can come] are those of so many tokens.
    """

    def __init__(self, sampling: Sampling, room: int) -> None:
        self._sampling = sampling
        self.count = 0
        self.ids = np.zeros(room, dtype=np.int64)
        self.factors = np.ones(room)
        self.less = np.zeros(room)
        self._index: dict[int, int] = {}
        self._said: set[int] = set()

    @staticmethod
    def of(sampling: Sampling, prompt: Sequence[int], vocab: int) -> SingleLogits | None:
        """Return those at the beginning of an answer; None if the request changes no single ones."""
        penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        if penalties == (1, 0, 0) and not sampling.logit_bias:
            return None
        seen = {token for token in prompt if token >= 0} if sampling.repetition_penalty != 1 else set()
        said = sampling.max_new_tokens if penalties != (1, 0, 0) else 0
        singles = SingleLogits(sampling, min(vocab, len(seen) + said + len(sampling.logit_bias)))
        for token in seen:
            singles.factors[singles._at(token)] = sampling.repetition_penalty
        for token, bias in sampling.logit_bias.items():
            singles.less[singles._at(token)] -= bias
        return singles

    def push(self, token: int) -> None:
        """Take a token of the answer."""
        sampling = self._sampling
        if (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1, 0, 0):
            return
        index = self._at(token)
        self.factors[index] = sampling.repetition_penalty
        self.less[index] += sampling.frequency_penalty
        if token not in self._said:
            self._said.add(token)
            self.less[index] += sampling.presence_penalty

    def _at(self, token: int) -> int:
        """Return the index of a token, which is a new one unless it has one."""
        index = self._index.setdefault(token, self.count)
        if index == self.count:
            self.ids[index] = token
            self.count += 1
        return index


def choose(
    logits: Tensor, samplings: Sequence[Sampling], places: Sequence[int], shapings: Sequence[Shaping | None]
) -> list[int]:
    """Return ``next_tokens`` of shaped logits [R, V]. Each shaping notes what its ``push`` will say of the token."""
    told = [(row, s) for row, s in enumerate(shapings) if s is not None and s.most_logprobs is not None]
    own = logits[[row for row, _ in told]].float().log_softmax(-1) if told else None
    logits = logits if logits.dtype == torch.float64 else logits.float()
    _change_single_logits(logits, [(row, s.singles) for row, s in enumerate(shapings) if s and s.singles])
    _mask(logits, [(row, s) for row, s in enumerate(shapings) if s and s.progress])
    chosen = next_tokens(logits, samplings, places)
    if own is not None:
        _note_logprobs(own, [chosen[row] for row, _ in told], [s for _, s in told])
    return chosen


def _change_single_logits(logits: Tensor, singles: Sequence[tuple[int, SingleLogits]]) -> None:
    """Apply penalties and bias in place, to all rows at once."""
    if not singles:
        return
    device = logits.device
    rows = torch.from_numpy(np.repeat([row for row, _ in singles], [s.count for _, s in singles])).to(device)
    ids = torch.from_numpy(np.concatenate([s.ids[: s.count] for _, s in singles])).to(device)
    factors = torch.from_numpy(np.concatenate([s.factors[: s.count] for _, s in singles])).to(device, logits.dtype)
    less = torch.from_numpy(np.concatenate([s.less[: s.count] for _, s in singles])).to(device, logits.dtype)
    some = logits[rows, ids]  # [N]
    logits[rows, ids] = torch.where(some < 0, some * factors, some / factors) - less


def _mask(logits: Tensor, shapings: Sequence[tuple[int, Shaping]]) -> None:
    """Make the tokens that a grammar does not allow impossible, in place. A row whose grammar fails notes its error."""
    if not shapings:
        return
    bits, errors = allowed_tokens([s.progress for _, s in shapings if s.progress is not None])
    for (_, shaping), error in zip(shapings, errors, strict=True):
        shaping.error = error
    barred_bits = np.unpackbits(~bits, axis=1, count=logits.shape[1], bitorder="little")
    barred = torch.from_numpy(barred_bits.view(np.bool_)).to(logits.device)
    if len(shapings) == len(logits):
        logits.masked_fill_(barred, -torch.inf)
    else:
        rows = torch.tensor([row for row, _ in shapings], device=logits.device)
        logits[rows] = logits[rows].masked_fill(barred, -torch.inf)


def _note_logprobs(own: Tensor, chosen: Sequence[int], shapings: Sequence[Shaping]) -> None:
    """Note the log-probability of each chosen token and of the likeliest. own: [R, V], the model's own."""
    each = own.gather(1, torch.tensor(chosen, device=own.device)[:, None])[:, 0].tolist()
    most = max(s.most_logprobs or 0 for s in shapings)
    values, ids = own.topk(min(most, own.shape[1]))
    for token, value, shaping, top in zip(
        chosen, each, shapings, zip(ids.tolist(), values.tolist(), strict=True), strict=True
    ):
        pairs = tuple(zip(*(some[: shaping.most_logprobs] for some in top), strict=True))
        shaping.next_logprob = TokenLogprob(token, value, pairs)
