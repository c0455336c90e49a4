"""The stages of a run: the schedule, read at the place where the trainer is."""

from __future__ import annotations

import math
from typing import Protocol

import lightning.pytorch as pl

from lightning_ast.lightning_internals.run_limits import run_length
from lightning_ast.run_length import Point
from lightning_ast.schedule import Schedule, Stage

__all__ = ["StageSource", "stage_of_batch", "stages_from"]


class StageSource(Protocol):
    """What a fit asks for its stages: a :class:`~lightning_ast.TwoStageScheduler`, or a subclass of a user's own."""

    def stage(self, trainer: pl.Trainer, batch_idx: int) -> Stage:
        """Return the stage of a training batch."""

    def faults(self, trainer: pl.Trainer, *, batches_known: bool, whole_epochs: bool = False) -> list[str]:
        """Find everything wrong with the stages that can be known."""

    def schedule_of(self, trainer: pl.Trainer) -> Schedule:
        """Return the schedule that this run keeps."""


def stage_of_batch(schedule: Schedule, trainer: pl.Trainer, batch_idx: int) -> Stage:
    """Return the stage of a training batch."""
    run = run_length(trainer)
    within = 0.0 if run.batches is None else batch_idx / run.batches
    return schedule.stage(Point(trainer.current_epoch + within, trainer.global_step), run)


def stages_from(epoch: int, schedule: Schedule, trainer: pl.Trainer) -> list[Stage] | None:
    """List the stages in the middle of each epoch from this one on; None in a run without an end that is known."""
    run = run_length(trainer)
    if run.epochs is None:
        return None
    middles = (each + 0.5 for each in range(epoch, math.ceil(run.epochs)))
    now = trainer.global_step
    return [schedule.stage(Point(middle, run.steps_at(middle) or now), run) for middle in middles]
