"""Facts of Lightning's loops and of a step in them: loaders, counts, and how many batches an epoch has."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fit_loop import _FitLoop
from torch import Tensor
from torch.utils.data import BatchSampler

__all__ = [
    "announce_batches",
    "batches_handed",
    "count_batches_anew",
    "lift_step_limit",
    "loaded_samples",
    "loaders",
    "logged_step",
    "loss_scale",
    "runs_backward",
    "set_up_loaders",
    "validation_interval_seconds",
    "wrapped_optimizers",
]


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
