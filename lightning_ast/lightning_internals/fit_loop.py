"""Facts of a run, of Lightning's loops and of a step: limits, loaders, counts, and how many batches an epoch has."""

from __future__ import annotations

import functools
import math
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fit_loop import _FitLoop
from torch import Tensor
from torch.utils.data import BatchSampler

from lightning_ast.schedule import RunLength

__all__ = [
    "accumulation",
    "announce_batches",
    "batches_handed",
    "count_batches_anew",
    "epoch_limit",
    "epochs_done",
    "first_callback",
    "lift_step_limit",
    "loaded_samples",
    "loaders",
    "logged_step",
    "loss_scale",
    "run_length",
    "runs_backward",
    "set_up_loaders",
    "validation_interval_seconds",
    "wrapped_optimizers",
]

C = TypeVar("C")


def announce_batches(trainer: pl.Trainer, batches: int | float) -> None:
    """Tell Lightning (limits, validation, progress bars) how many batches the epoch has; infinity for unknown."""
    # Lightning has computed both from the length of the user's loader when it set that up.
    trainer.fit_loop.max_batches = batches
    if validation_interval_seconds(trainer) is None and isinstance(trainer.val_check_interval, float):
        known = math.isfinite(batches)
        trainer.val_check_batch = max(1, int(batches * trainer.val_check_interval)) if known else batches


def validation_interval_seconds(trainer: pl.Trainer) -> float | None:
    """Return the time between validations where ``val_check_interval`` is one (not before Lightning 2.6), else None."""
    seconds = getattr(trainer, "_val_check_time_interval", None)
    return None if seconds is None else float(seconds)


def loaders(loop: _FitLoop | _EvaluationLoop) -> list[Any]:
    """List the user's loaders as Lightning has set them up; there are none before."""
    return [] if loop._combined_loader is None else list(loop._combined_loader.flattened)


def loaded_samples(trainer: pl.Trainer) -> int | None:
    """Return the number of samples that the loaders put into the running batch; None where they do not tell alike."""
    sizes = {_loaded_by(loader, trainer) for loader in loaders(trainer.fit_loop)}
    return sizes.pop() if len(sizes) == 1 else None


def _loaded_by(loader: Any, trainer: pl.Trainer) -> int | None:
    batches = getattr(loader, "batch_sampler", None)
    source: Any = batches if isinstance(batches, BatchSampler) else loader
    size = getattr(source, "batch_size", None)
    if not isinstance(size, int):
        return None
    try:
        left = len(source.sampler) - trainer.fit_loop.epoch_loop.batch_idx * size
    except (AttributeError, TypeError):  # an iterable dataset, whose last batch may be shorter
        return None if trainer.is_last_batch and not getattr(source, "drop_last", False) else size
    return min(size, left) if left > 0 else None


def set_up_loaders(loop: _FitLoop, *, anew: bool = False) -> None:
    """Set the training loaders up where that has not been done; with ``anew`` in any case."""
    if anew:  # setup_data() keeps one that is not due to be reloaded
        loop._combined_loader = None
    loop.setup_data()


def batches_handed(loop: _FitLoop) -> int:
    """Count the batches given to the loop since its loader was started; skipped ones and the running one count too."""
    # `fetched` runs ahead of the loop: the fetcher holds a batch back to know whether it is the last.
    fetcher: Any = loop._data_fetcher
    return int(fetcher.fetched) - len(getattr(fetcher, "batches", ()))


def logged_step(loop: _FitLoop) -> int:
    """Return the step that Lightning's loggers give to what is logged at an epoch's end."""
    # Lightning logs an epoch's end under the step of its last batch, which it has counted by then.
    return max(loop.epoch_loop._batches_that_stepped - 1, 0)


def lift_step_limit(loop: _FitLoop) -> None:
    """Let the run go on behind ``max_steps``, until it is ended from within."""
    loop.epoch_loop.max_steps = -1


def count_batches_anew(loop: _FitLoop, length: int | float) -> None:
    """Count batches from 0 when an epoch of this length would end, so that ``batch_idx`` stays within it."""
    done = loop.epoch_loop.batch_progress.current
    if done.ready >= length:
        done.reset()


def loss_scale(trainer: pl.Trainer) -> Tensor | None:
    """Return what 16-bit training multiplies the loss by, on its device; None where nothing scales it."""
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    scale: Tensor | None = getattr(scaler, "_scale", None)  # get_scale() would wait for the device
    return scale


def wrapped_optimizers(trainer: pl.Trainer) -> list[LightningOptimizer]:
    """List the optimizers as ``module.optimizers()`` gives them to a step that optimizes by itself."""
    return list(trainer.strategy._lightning_optimizers)


def runs_backward(trainer: pl.Trainer) -> bool:
    """Tell whether training steps have a backward: in the last epoch of weight averaging they have none."""
    return not trainer.fit_loop._skip_backward


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
