"""The limits of a run: its epochs, its optimizer steps, its accumulation; and the callbacks that change them."""

from __future__ import annotations

import functools
import math
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, StochasticWeightAveraging

from lightning_ast.schedule import RunLength

__all__ = ["accumulation", "epoch_limit", "epochs_done", "first_callback", "run_length"]

C = TypeVar("C")


def run_length(trainer: pl.Trainer) -> RunLength:
    """Read what limits a run; the batches of an epoch are known once the training loader is set up."""
    batches = trainer.num_training_batches  # infinite before the loader is set up, and for an endless one
    module = trainer.lightning_module
    automatic = module is None or module.automatic_optimization  # None: the trainer was not given a module yet
    return RunLength(
        max_epochs=epoch_limit(trainer),
        max_steps=trainer.max_steps if trainer.max_steps > 0 else None,
        batches=int(batches) if math.isfinite(batches) and batches > 0 else None,
        accumulate=accumulation(trainer) if automatic else None,
    )


def epochs_done(trainer: pl.Trainer) -> int:
    """Count the epochs that this trainer has trained, in an earlier fit included."""
    return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]


def epoch_limit(trainer: pl.Trainer) -> int | None:
    """Return how many epochs the run trains, or None without a limit."""
    limit = trainer.max_epochs
    for callback in _callbacks(trainer, StochasticWeightAveraging):
        # It adds an epoch that only renews BatchNorm's statistics, in which nothing is trained.
        if limit is not None and limit == getattr(callback, "_max_epochs", math.inf) + 1:
            limit -= 1
    return limit if limit is not None and limit > 0 else None


def accumulation(trainer: pl.Trainer) -> dict[int, int]:
    """Return the batches to an optimizer step from each of these epochs on, the first of which is 0."""
    for callback in _callbacks(trainer, GradientAccumulationScheduler):
        return dict(callback.scheduling)
    return {0: trainer.accumulate_grad_batches}


def first_callback(trainer: pl.Trainer, kind: type[C]) -> C | None:
    """Find the Trainer's first callback of a kind, or None."""
    return next((c for c in trainer.callbacks if isinstance(c, kind)), None)  # type: ignore[attr-defined]


def _callbacks(trainer: pl.Trainer, kind: type[Any]) -> list[Any]:
    """List the callbacks of a kind."""
    # Found by name: the classes of the package `pytorch_lightning` are others than those of `lightning`.
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if kind.__name__ in _class_names(type(callback))]  # type: ignore[arg-type]


@functools.cache  # it is asked in every step
def _class_names(cls: type[Any]) -> frozenset[str]:
    return frozenset(base.__name__ for base in cls.__mro__)
