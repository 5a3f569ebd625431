"""The live core of the engine: sequences in, ended sequences out, one pass of the model at a time.

Each step is schedule, run, postprocess. Between two steps sequences may be added and aborted, and what is wrong with
one of them ends that one alone.

Legend: R sequences, T tokens of a pass, D hidden width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from tinyllava_fast.errors import CheckpointError, DataError, UserError
from tinyllava_fast.infer.fast_model.prepare import PreparedModel
from tinyllava_fast.infer.fast_model.runner import PackedDecoder
from tinyllava_fast.infer.sampling import all_finite, next_tokens
from tinyllava_fast.infer.scheduling.images import ImageEncoder, image_key
from tinyllava_fast.infer.scheduling.scheduler import Scheduled, Scheduler
from tinyllava_fast.infer.scheduling.sequence import Sequence
from tinyllava_fast.infer.scheduling.speculation import Speculation
from tinyllava_fast.infer.scoring import log_probabilities
from tinyllava_fast.infer.shaping import choose

LOGIT_ROWS = 128  # rows of [R, V] logits computed at once: 25 MB in fp32 for a vocabulary of 49k


class Core:
    """Runs sequences on a model.

    vocab: tokens that may be generated, the first rows of the embedding. source: what messages call the model.
    speculate: most tokens of a sequence that are guessed in a step.
    """

    def __init__(
        self,
        model: PreparedModel,
        images: ImageEncoder,
        decoder: PackedDecoder,
        scheduler: Scheduler,
        *,
        vocab: int,
        source: str,
        speculate: int = 0,
    ) -> None:
        self.model = model
        self.images = images
        self.decoder = decoder
        self.scheduler = scheduler
        self.vocab = vocab
        self.source = source
        self.generated_tokens = 0
        self.speculation = Speculation(speculate)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Do one pass, a prefill or one token for each running sequence, and return the sequences that have ended.

        A sequence that fails or is aborted before it runs is returned at once, without a pass.
        Raises CheckpointError if the model's numbers are not finite; the sequences of the pass have failed then.
        """
        if ended := self.scheduler.collect():
            return ended
        scheduled = self.scheduler.schedule()
        if scheduled is not None:
            before = [(s, s.num_cached_tokens, len(s.tokens)) for s in scheduled.sequences]
            try:
                guesses = {} if scheduled.stops else self.speculation.guess(scheduled.sequences)
                if guesses:
                    self._verify(scheduled.sequences, guesses)
                elif scheduled.stops or not self._step_on_device(scheduled.sequences):
                    hidden, ends = self._run(scheduled)
                    self._postprocess(scheduled.sequences, hidden, ends)
            except BaseException as error:
                self._recover(scheduled, error, before)
        return self.scheduler.collect()

    def _step_on_device(self, sequences: list[Sequence]) -> bool:
        """Do a step of decoding whose tokens the device chooses, and append them; False if nothing was done."""
        began = time.perf_counter()
        chosen = self.decoder.choose(sequences, self.vocab)
        if chosen is None:
            return False
        self.scheduler.pace.stepped(len(sequences), time.perf_counter() - began)
        for sequence in sequences:
            sequence.num_cached_tokens += 1
        if min(chosen) < 0 and self.decoder.graphs is not None:
            self._check_finite(sequences, self.decoder.graphs.logits)
        self._append(list(zip(sequences, chosen, strict=True)))
        return True

    def _run(self, scheduled: Scheduled) -> tuple[Tensor, np.ndarray]:
        """Return hidden states [T, D] of the pass, and the row of each sequence's last token [R]."""
        pace, sequences = self.scheduler.pace, scheduled.sequences
        if not scheduled.stops:
            began = time.perf_counter()
            hidden = self.decoder.step(sequences)
            pace.stepped(len(sequences), time.perf_counter() - began)
            return hidden, np.arange(len(sequences))
        features = self._encode_images(scheduled)
        began = time.perf_counter()
        if scheduled.riders:
            result = self.decoder.step_with_riders(scheduled.sequences, scheduled.stops, features)
            pace.rode(scheduled.riders, time.perf_counter() - began)
        else:
            result = self.decoder.prefill(scheduled.groups, scheduled.sequences, scheduled.stops, features)
            pace.prefilled(len(result[0]), time.perf_counter() - began)
        return result

    def _verify(self, sequences: list[Sequence], guesses: Mapping[Sequence, list[int]]) -> None:
        """Do a step with guesses, and append to each sequence what follows as long as the guesses are what was chosen.

        Tokens are chosen one after the other, as in steps of one: what a sequence was told of each is the same.
        """
        began = time.perf_counter()
        hidden = self.decoder.verify(sequences, guesses)
        self.scheduler.pace.stepped(len(sequences), time.perf_counter() - began)
        counts = [1 + len(guesses.get(s, ())) for s in sequences]
        logits = self._logits([s for s, count in zip(sequences, counts, strict=True) for _ in range(count)], hidden)
        right = dict.fromkeys(guesses, 0)
        rows = np.cumsum([0, *counts[:-1]]).tolist()
        going = [(s, row) for s, row in zip(sequences, rows, strict=True) if not s.ended]
        while going:
            for sequence, _ in going:
                sequence.num_cached_tokens += 1
            part = [s for s, _ in going]
            self._append(list(zip(part, _choose(part, logits[[row for _, row in going]]), strict=True)))
            later = []
            for sequence, row in going:
                guessed, place = guesses.get(sequence, []), right.get(sequence, 0)
                if not sequence.ended and place < len(guessed) and sequence.tokens[-1] == guessed[place]:
                    right[sequence] += 1
                    later.append((sequence, row + 1))
            going = later
        self.speculation.learn(guesses, right)

    def _encode_images(self, scheduled: Scheduled) -> dict[object, Tensor]:
        """Return features by image. Sequences whose images cannot be read fail and leave the pass."""
        failed: dict[object, DataError] = {}
        wanted = (
            (image, sequence.request.named)
            for sequence, first, stop in scheduled.parts()
            for image, _ in sequence.images_between(first, stop)
        )
        features = self.images.encode(wanted, failed)
        for sequence in scheduled.sequences if failed else ():
            keys = (image_key(image) for image in sequence.request.images)
            error = next((failed[key] for key in keys if key in failed), None)
            if error is not None:
                cause = error.__cause__ or error
                own = DataError(f"{sequence.request.named}: {cause}")
                own.__cause__ = cause
                sequence.fail(own)
        scheduled.drop_ended()
        return features

    def _postprocess(self, sequences: list[Sequence], hidden: Tensor, ends: np.ndarray) -> None:
        """Give each sequence what the pass has found for it: its next token, or the probabilities it asks for."""
        for sequence, length in zip(sequences, np.diff(ends, prepend=-1).tolist(), strict=True):
            sequence.num_cached_tokens += length
        known = np.array([s.num_cached_tokens == s.num_tokens for s in sequences], dtype=bool)
        if not known.all():  # of the others a part of the prompt is left
            sequences, ends = [s for s, all_of_it in zip(sequences, known, strict=True) if all_of_it], ends[known]
        scores = np.array([bool(s.scored) for s in sequences], dtype=bool)
        if not sequences:
            return
        if not scores.any():
            self._generate(sequences, hidden, ends)
        else:
            self._score([s for s in sequences if s.scored], hidden, ends[scores])
            self._generate([s for s in sequences if not s.scored], hidden, ends[~scores])

    def _generate(self, sequences: list[Sequence], hidden: Tensor, ends: np.ndarray) -> None:
        """Append one token to each sequence. hidden [T, D]; ends [R]: rows of last tokens."""
        if len(ends) < len(hidden):
            hidden = hidden[torch.from_numpy(ends).to(hidden.device)]
        chosen: list[tuple[Sequence, int]] = []
        for i in range(0, len(sequences), LOGIT_ROWS):
            part = sequences[i : i + LOGIT_ROWS]
            logits = self._logits(part, hidden[i : i + LOGIT_ROWS])
            going = [row for row, sequence in enumerate(part) if not sequence.ended]
            if len(going) < len(part):
                part, logits = [part[row] for row in going], logits[going]
            chosen += zip(part, _choose(part, logits), strict=True)
        self._append(chosen)

    def _logits(self, sequences: list[Sequence], hidden: Tensor) -> Tensor:
        """Logits [R, V] of rows of sequences [R, D]. Numbers that are none: see ``_check_finite``."""
        # Rows past the tokenizer are padding of the embedding: never trained, so they may hold any logit.
        logits = self.model.logits(hidden)[:, : self.vocab]
        self._check_finite(sequences, hidden, logits)
        return logits

    def _append(self, chosen: Items[tuple[Sequence, int]]) -> None:
        """Append to each sequence its token."""
        self.generated_tokens += len(chosen)
        for sequence, token in chosen:
            if not sequence.ended:  # what ``on_token`` of another one may have done
                _append(sequence, token)

    def _score(self, sequences: list[Sequence], hidden: Tensor, ends: np.ndarray) -> None:
        """Note the probabilities of each sequence's scored tokens, which ends it."""
        rows = np.concatenate([np.arange(e - len(s.scored), e) + 1 for s, e in zip(sequences, ends, strict=True)])
        hidden = hidden[torch.from_numpy(rows).to(hidden.device)]
        targets = torch.tensor([t for s in sequences for t in s.scored], device=hidden.device)
        each, best = log_probabilities(self.model.logits, hidden, targets, rows=LOGIT_ROWS, vocab=self.vocab)
        counts = [len(s.scored) for s in sequences]
        self._check_finite([s for s, count in zip(sequences, counts, strict=True) for _ in range(count)], hidden, each)
        for sequence, result in zip(sequences, zip(each.split(counts), best.split(counts), strict=True), strict=True):
            if not sequence.ended:
                sequence.result = result
                sequence.end("scored")

    def _check_finite(self, sequences: list[Sequence], *numbers: Tensor) -> None:
        """CheckpointError if some number is none, before any choice is made of them: a token, a score.

        numbers: [R, ...] each. sequences: that of each row. If only rows with adapters have such numbers, their
        sequences fail, and the others go on.
        """
        if all(all_finite(some) for some in numbers):
            return
        right = torch.stack([some.reshape(len(some), -1).isfinite().all(1) for some in numbers]).all(0).tolist()
        bad = list(dict.fromkeys(s for s, is_right in zip(sequences, right, strict=True) if not is_right))
        dtype = str(self.model.lmm.dtype).removeprefix("torch.")
        remedy = "; in float16 they may have overflowed: try dtype bfloat16" if dtype == "float16" else ""
        if all(s.adapter for s in bad):
            for sequence in bad:
                if not sequence.ended:
                    name = f"{sequence.request.named}: the numbers of adapter {sequence.request.adapter!r}"
                    sequence.fail(CheckpointError(f"{name} overflow (nan or infinity): its training diverged{remedy}"))
            return
        names = ", ".join(s.request.named for s in bad[:3]) + ", ..." * (len(bad) > 3)
        raise CheckpointError(
            f"{self.source}: the model's numbers are not finite (nan or infinity) for {names}: a weight is "
            f"damaged or the training diverged; take an earlier checkpoint or copy the folder again{remedy}"
        )

    def _recover(self, scheduled: Scheduled, error: BaseException, before: Iterable[tuple[Sequence, int, int]]) -> None:
        """Shrink the batch after a pass that ran out of memory; any other error fails its sequences and is raised.

        before: the sequences of the pass with their numbers of cached and of generated tokens when it began.
        """
        if not is_out_of_memory(error):
            _fail(scheduled.sequences, error)
            raise error
        for sequence, cached, count in before:
            if not sequence.ended:  # memory may have run out between the K/V and the token that it is for
                sequence.num_cached_tokens = cached if len(sequence.tokens) == count else sequence.num_tokens - 1
        self.scheduler.shrink(scheduled, error.with_traceback(None))  # its frames hold the tensors of the pass
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out. On a CPU torch has no class of its own for it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _choose(sequences: list[Sequence], logits: Tensor) -> list[int]:
    """Return the next token of each sequence. logits: [R, V], which may be changed."""
    samplings, places = [s.request.sampling for s in sequences], [len(s.tokens) for s in sequences]
    shapings = [s.shaping for s in sequences]
    return choose(logits, samplings, places, shapings) if any(shapings) else next_tokens(logits, samplings, places)


def _append(sequence: Sequence, token: int) -> None:
    """Append a token and hand on its text. What goes wrong in its grammar or ``on_token`` ends this sequence alone."""
    try:
        piece = sequence.append(token)
    except UserError as error:
        sequence.fail(error)
        return
    if piece and sequence.on_token is not None:
        try:
            sequence.on_token(sequence.request.id, piece)
        except Exception as error:
            sequence.fail(error)


def _fail(sequences: Iterable[Sequence], error: BaseException) -> None:
    for sequence in sequences:
        if not sequence.ended:
            sequence.fail(error)
