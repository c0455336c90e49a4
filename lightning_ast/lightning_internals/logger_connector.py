"""The values that Lightning has logged and will write, and ways to show values when it is too late to log them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping

import lightning.pytorch as pl
import torch

__all__ = [
    "batches_completed",
    "forget_step_values",
    "last_logged",
    "log_of_rank_zero",
    "logs_this_step",
    "remove_shown",
    "running_step",
    "show",
    "will_write",
    "write",
]


def running_step(trainer: pl.Trainer) -> int:
    """Return the step under which Lightning's loggers put what the running batch logs."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def batches_completed(trainer: pl.Trainer) -> int:
    """Count the batches that went through all their hooks; Lightning writes a batch's values right after that."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.completed)


def logs_this_step(trainer: pl.Trainer) -> bool:
    """Tell whether the loggers take what is logged in this step."""
    return bool(trainer._logger_connector.should_update_logs)


def will_write(trainer: pl.Trainer) -> bool:
    """Tell, in ``on_train_batch_end``, whether Lightning will write what this batch logs."""
    if not (logs_this_step(trainer) or trainer.fast_dev_run):  # type: ignore[attr-defined]
        return False
    # Lightning writes at the end of an optimizer step alone; a manual step has no accumulation of its own.
    return not (trainer.fit_loop._should_accumulate() and trainer.lightning_module.automatic_optimization)


def forget_step_values(trainer: pl.Trainer, names: Collection[str]) -> None:
    """Prevent Lightning from writing the values of an earlier step again under the number of this one."""
    # Lightning keeps what a step logged until the same name is logged once more, and writes it where a stop that was
    # asked for in the meantime makes an extra step a logging step. The bar and `callback_metrics` keep theirs.
    for result in trainer.fit_loop.epoch_loop._results.values():
        if result.meta.on_step and result.meta.name in names:
            result.has_reset = True


def last_logged(trainer: pl.Trainer, name: str) -> float | None:
    """Return the value that Lightning wrote last under a name that is logged by epoch, or None."""
    # The public `trainer.logged_metrics` reduces the metrics of the running epoch over the processes, which hangs where
    # one of them fails alone.
    value = trainer._logger_connector._logged_metrics.get(name)
    return None if value is None else float(value)


def log_of_rank_zero(module: pl.LightningModule, values: Mapping[str, float | torch.Tensor]) -> None:
    """Log values of an epoch, which rank 0 alone has."""
    # Lightning recommends sync_dist=True for each of them, and that would reduce them over the processes.
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\('(ast|energy)/")
    module.log_dict(values, on_step=False, on_epoch=True, batch_size=1, rank_zero_only=True)


def show(trainer: pl.Trainer, logged: Mapping[str, float], *, bar: Mapping[str, float]) -> None:
    """Put values where callbacks, users and the progress bar read them, when it is too late for ``module.log``."""
    connector = trainer._logger_connector
    tensors = {name: torch.tensor(value) for name, value in logged.items()}
    connector._callback_metrics.update(tensors)
    connector._logged_metrics.update(tensors)
    connector._progress_bar_metrics.update(bar)


def remove_shown(trainer: pl.Trainer, names: Iterable[str]) -> None:
    """Take values out of the progress bar."""
    for name in names:
        trainer._logger_connector._progress_bar_metrics.pop(name, None)


def write(trainer: pl.Trainer, values: Mapping[str, float], *, step: int, epoch: int) -> None:
    """Give values, if there are any, to every logger; the step is on the axis of :func:`running_step`."""
    if not values or not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        logger.log_metrics({**values, "epoch": epoch}, step=step)  # Lightning adds the epoch to whatever it logs
        logger.save()
