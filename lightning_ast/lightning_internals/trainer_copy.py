"""A copy of a Trainer that has not run: with connectors, strategy, plugins and loops of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.prediction_loop import _PredictionLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerState

__all__ = ["copied_trainer", "fresh_loops"]


def copied_trainer(trainer: pl.Trainer, module: pl.LightningModule, logger: Callable[[], Logger]) -> pl.Trainer:
    """Copy a Trainer, which stays as it is, without its callbacks, its profiler, and what an earlier fit left in it.

    The copy holds ``module`` where an earlier fit left one; ``logger`` makes a logger for each of the Trainer's.
    """
    strategy: Any = trainer.strategy
    settings: Any = trainer
    # deepcopy takes what stands in its memo as the copy. Without these stand-ins it would copy the data of an earlier
    # fit, its optimizers' states and open log files, or fail on what cannot be copied.
    stand_ins: list[tuple[Any, Any]] = [
        (settings.callbacks, []),
        (settings._loggers, [logger() for _ in settings._loggers]),
        (settings.profiler, PassThroughProfiler()),
        (settings.state, TrainerState()),
        *((getattr(settings, f"{name}_loop"), None) for name in ("fit", "validate", "test", "predict")),
        *((held, module) for held in (strategy._lightning_module, strategy._model)),
        *((held, []) for held in (strategy._optimizers, strategy._lightning_optimizers)),
        (strategy.lr_scheduler_configs, []),
        (getattr(settings, "datamodule", None), None),
    ]
    memo = {id(held): stand_in for held, stand_in in stand_ins if held is not None}
    copied: pl.Trainer = copy.deepcopy(trainer, memo)
    fresh_loops(copied, trainer)
    return copied


def fresh_loops(copied: Any, trainer: pl.Trainer) -> None:
    """Give a copy the loops of a Trainer that has not run, with the limits of the user's ``trainer``."""
    copied.fit_loop = _FitLoop(copied, min_epochs=0, max_epochs=trainer.max_epochs)
    copied.fit_loop.epoch_loop = _TrainingEpochLoop(copied, max_steps=trainer.max_steps)
    # Made as Trainer.__init__ makes them: the copied loops would refer to the user's trainer, and be half run.
    mode = trainer.validate_loop.inference_mode
    validating = TrainerFn.VALIDATING, RunningStage.VALIDATING
    testing = TrainerFn.TESTING, RunningStage.TESTING
    copied.validate_loop = _EvaluationLoop(copied, *validating, verbose=False, inference_mode=mode)
    copied.test_loop = _EvaluationLoop(copied, *testing, inference_mode=mode)
    copied.predict_loop = _PredictionLoop(copied, inference_mode=mode)
