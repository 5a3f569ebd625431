"""The way a stage reads pictures: as its keys say, else as the model that it begins with did."""

from __future__ import annotations

from dataclasses import asdict

from tinyllava_fast.config.schema import DataConfig
from tinyllava_fast.data.pictures import REFERENCE, UPRIGHT, PictureReading
from tinyllava_fast.train.checkpoint import TrainState


def settle_reading(state: TrainState, data: DataConfig, before: PictureReading | None, resumed: bool) -> PictureReading:
    """Return the reading of the state's stage, and note it in the state so that a resumed run keeps it.

    before: of the model that the stage begins with; None: a new one, for which pictures are upright and on white.
    resumed: whether the stage goes on from a checkpoint. One that notes no reading is of a version that read pictures
    the reference's way, and goes on that way: they must not change in the middle of a run.
    """
    if resumed:
        noted = state.readings.get(state.stage)
        reading = PictureReading(**noted) if noted is not None else REFERENCE
    else:
        reading = stage_reading(data, before if before is not None else UPRIGHT)
    state.readings[state.stage] = asdict(reading)
    return reading


def stage_reading(data: DataConfig, before: PictureReading) -> PictureReading:
    """Return how a stage that begins reads pictures: as its keys say, else as the model it begins with does."""
    return PictureReading(data.orientation or before.orientation, data.background or before.background)
