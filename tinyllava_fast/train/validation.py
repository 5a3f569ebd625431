"""Validation of a stage between its steps: the loss of the records that are held out.

It leaves no trace in the training: weights, random numbers, dropout and the position in the data are as they were. What
is made of the result stands in train/standing.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar
from zlib import crc32

import torch

from tinyllava_fast import group
from tinyllava_fast.config.schema import StageConfig
from tinyllava_fast.config.validation import LOSS, ValidationConfig
from tinyllava_fast.data.loader import Loader
from tinyllava_fast.log import log
from tinyllava_fast.models.flops import Trains, costs_of, step_flops
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.train import seed
from tinyllava_fast.train.answers import Answering, SampleRow, rows
from tinyllava_fast.train.engine.base import TrainingEngine
from tinyllava_fast.train.features import FeatureCache
from tinyllava_fast.train.standing import Standing, Validation, judge, said

T = TypeVar("T")


_NOTHING_TRAINS = Trains(llm=False, connector=False)
_PROMPT, _ANSWER = 64, 16  # tokens of a question, and of an answer, about
_DECODED = 10  # a token that is decoded takes as long as so many of a pack


def cost_of(
    model: LMM, stage: StageConfig, loader: Loader | None, answering: Answering | None, flops_of_step: float
) -> float:
    """Return the work of one validation as a number of steps, by FLOPs. flops_of_step: of this process."""
    costs, flops = costs_of(model), 0.0
    if loader is not None:
        dataset, packs = loader.dataset, loader.steps * loader.world_size
        images, supervised = int(dataset.images.sum()), dataset.report.supervised_tokens
        whole = step_flops(costs, dataset.lengths.tolist(), images, supervised, _NOTHING_TRAINS)
        flops += sum(whole.values()) * min(stage.validation.max_packs or packs, packs) / packs / loader.world_size
    if answering is not None:
        asked = [stage.validation.max_new_tokens] * len(answering.samples)
        asked += [plan.benchmark.max_new_tokens for plan in answering.plans for _ in plan.questions]
        prompts = [model.tokens_per_image + _PROMPT] * len(asked)
        decoded = _DECODED * sum(min(most, _ANSWER) for most in asked)
        flops += sum(step_flops(costs, prompts, len(asked), decoded, _NOTHING_TRAINS).values())
        flops += 2 * decoded * costs.decoder_weights
    return flops / max(flops_of_step, 1.0)


class Validator:
    """Validates the model of one stage. every: steps between validations; 0: only after the last step.

    loader: of the records that are held out, at its first pack; None: there are none. answering: what the model is
    asked besides, by the first rank, on whole weights.
    """

    def __init__(
        self,
        stage: StageConfig,
        model: LMM,
        engine: TrainingEngine,
        loader: Loader | None,
        answering: Answering | None,
        *,
        every: int,
        features: FeatureCache | None = None,
    ) -> None:
        self.every, self.config = every, stage.validation
        self._answering = answering
        self._stage, self._model, self._engine, self._loader, self._features = stage, model, engine, loader, features
        self._begin = loader.state_dict() if loader is not None else {}
        self._measured = _measured(self.config, loader)

    def due(self, stage_step: int, last: bool) -> bool:
        """Return whether a step of the stage is followed by a validation. last: it is the stage's last one."""
        return last or (self.every > 0 and stage_step % self.every == 0)

    def validate(self, standing: Standing, step: int) -> Validation:
        """Validate the model as it is now, note the result in the standing, and return it. Every rank calls it."""
        started, model = time.perf_counter(), self._model
        label_smoothing, z_loss, by_segment = model.label_smoothing, model.z_loss, model.loss_by_segment
        with _untouched(model), self._engine.averaged():
            model.set_loss(label_smoothing=0.0, z_loss=0.0)
            try:
                found = self._loss(self._loader) if self._loader is not None else Validation()
            finally:
                model.set_loss(label_smoothing=label_smoothing, z_loss=z_loss, by_segment=by_segment)
            if self._answering is not None:
                self._ask(self._answering, standing, found, f"{self._stage.name}-{step:08d}")
        found["seconds"] = time.perf_counter() - started
        judge(standing, self.config, step, found, self._measured)
        log.info("%s: %s", self._stage.name, said(standing))
        return found

    def close(self) -> None:
        """Let go of the processes that read the data."""
        if self._loader is not None:
            self._loader.close()

    def table(self, standing: Standing) -> list[SampleRow]:
        """Return the samples with the answers of the last validation and of the one before."""
        if self._answering is None:
            return []
        return rows(self._answering.samples, standing.get("answers", {}), standing.get("answers_before", {}))

    def _ask(self, answering: Answering, standing: Standing, found: Validation, name: str) -> None:
        """Let the model answer, and put the answers into the standing, the scores into the result."""
        scores: dict[str, float] = {}
        if self._engine.rank == 0:
            answers, scores = answering.ask(self._model, name)
            standing["answers_before"], standing["answers"] = standing.get("answers", {}), answers
        if answering.plans:
            found["scores"] = group.from_first(scores)

    def _loss(self, loader: Loader) -> Validation:
        engine = self._engine
        loader.load_state_dict(self._begin)
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        samples = supervised = 0
        most = self.config.max_packs
        for batch in islice(loader, None if most is None else math.ceil(most / loader.world_size)):
            seen = self._features.attach(batch) if self._features else batch
            total += engine.evaluate(seen)
            samples, supervised = samples + batch.num_samples, supervised + batch.num_supervised
        loader.close()
        counts = torch.tensor([samples, supervised], dtype=torch.float64, device=engine.device)
        loss, samples_, supervised_ = engine.all_reduce_sum(torch.cat([total[None], counts])).tolist()
        return {
            "loss": loss / max(supervised_, 1.0),
            "samples": int(samples_),
            "supervised_tokens": int(supervised_),
        }


def _measured(config: ValidationConfig, loader: Loader | None) -> str:
    """Return a checksum of what the metric is measured with."""
    facts: tuple[object, ...] = (config.max_packs,)
    if config.metric != LOSS:
        facts = tuple(repr(one) for one in config.benchmarks if one.name == config.metric)
    elif loader is not None:
        facts += (loader.dataset.fingerprint, loader.dataset.names_checksum())
    return f"{crc32(repr(facts).encode()):08x}"


@contextmanager
def _untouched(model: LMM) -> Iterator[None]:
    """Put the model into eval mode, and restore the modes and the random state of the process afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    plain, tensors = seed.rng_state()
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        seed.set_rng_state(plain, tensors)
