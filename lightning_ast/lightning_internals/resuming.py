"""The place of a resumed run in the fit loop, and corrections that make it go on as the uninterrupted run would."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.loops.fit_loop import _FitLoop

__all__ = [
    "batches_done",
    "begin_new_epoch",
    "hold_reload",
    "knows_its_place",
    "last_reloads",
    "leave_start",
    "load_loader_states",
    "reload_as_due",
    "reload_validation_as_due",
    "restart_loader",
    "tells_resumption",
    "written_within",
]


def batches_done(loop: _FitLoop) -> int:
    """Count the batches of the running epoch trained on before the checkpoint; 0 where it is to begin anew."""
    if not loop.restarted_mid_epoch or _finished_a_batch_last(loop):
        return 0
    return int(loop.epoch_loop.batch_progress.current.processed)  # type: ignore[attr-defined]


def written_within(checkpoint: dict[str, Any]) -> bool:
    """Tell whether a checkpoint was written in the midst of an epoch."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    return bool(progress) and not progress["is_last_batch"] and progress["current"]["ready"] > 0


def _finished_a_batch_last(loop: _FitLoop) -> bool:
    """Tell whether the checkpoint was written at the end of an epoch's last batch, before the end of the epoch."""
    return loop.epoch_loop.restarted_on_train_batch_end and loop.epoch_loop.batch_progress.is_last_batch


def begin_new_epoch(loop: _FitLoop) -> None:
    """Close the epoch at whose end the checkpoint was written, so that the next one begins as any other does."""
    # Lightning (2.6) would compare the old epoch's batches with the number of the new one, leave out the hook
    # on_train_epoch_start, validate at odd places, and with max_steps first run a batch of an epoch that is over.
    if _finished_a_batch_last(loop):
        loop.epoch_loop.batch_progress.increment_completed()
        loop.epoch_loop._batches_that_stepped += 1
    elif loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
    else:
        return
    loop.reset_restart_stage()
    loop.epoch_loop.reset_restart_stage()
    # else Lightning would take the new epoch for the rest of the old one, and leave out its first hooks
    for part in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        part._restarting = False


def knows_its_place(loader: Any) -> bool:
    """Tell whether a loader saves and restores its own position, as torchdata's ``StatefulDataLoader`` does."""
    return isinstance(loader, _Stateful)


def load_loader_states(loop: _FitLoop) -> None:
    """Bring the loaders that know their place to it, where Lightning has not."""
    # Lightning (2.6) does so when it sets them up, for checkpoints from the midst of an epoch alone; and a call of
    # estimated_stepping_batches in configure_optimizers sets them up before the checkpoint is read.
    if loop._combined_loader_states_to_load:
        assert loop._combined_loader is not None
        assert loop._data_fetcher is not None
        loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
        loop._combined_loader_states_to_load = []
        iter(loop._data_fetcher)


def restart_loader(loop: _FitLoop) -> None:
    """Start the loader again, unless Lightning is going to do so for this epoch."""
    # In any other epoch Lightning starts it itself; started once more it would draw once more from the sampler.
    resuming = loop.restarting or getattr(loop, "is_resuming", False)
    if resuming or loop.trainer.current_epoch == 0:
        assert loop._data_fetcher is not None
        iter(loop._data_fetcher)


def leave_start(loop: _FitLoop) -> None:
    """Let Lightning start the loader of a new epoch, behind the hooks that tell of the epoch."""
    # Lightning (2.6) does so in any epoch but the first of a resumed run. A batch sampler may be told the number of the
    # epoch in such a hook.
    if hasattr(loop, "_resuming_from_checkpoint"):
        loop._resuming_from_checkpoint = False


def tells_resumption(trainer: pl.Trainer) -> bool:
    """Tell whether this Lightning knows a run that goes on from one that a tuner put back; 2.5.0 does not."""
    return hasattr(trainer.fit_loop, "is_resuming")


def last_reloads(loop: _FitLoop) -> dict[str, int | None]:
    """Name the epochs in which the training and the validation loaders were set up, None before."""
    epochs = {
        "reloaded": loop._last_train_dl_reload_epoch,
        "validation_reloaded": loop.epoch_loop.val_loop._last_val_dl_reload_epoch,
    }
    return {name: int(epoch) if math.isfinite(epoch) else None for name, epoch in epochs.items()}


def hold_reload(loop: _FitLoop) -> None:
    """Keep the loaders that a resumed run has just set up until :func:`reload_as_due` decides."""
    # A reload draws random numbers: it has to wait until the random state is that of the interrupted run.
    loop._last_train_dl_reload_epoch = loop.trainer.current_epoch


def reload_validation_as_due(loop: _FitLoop, last: int | None) -> None:
    """Set the validation loaders up at the epochs where the uninterrupted run would.

    ``last`` is ``validation_reloaded`` of the checkpoint's :func:`last_reloads`; None for one that has none.
    """
    trainer = loop.trainer
    validation = loop.epoch_loop.val_loop
    if last is None or not trainer.enable_validation:
        return
    # The uninterrupted run has had them since its first validation. They are made ahead of the random state's
    # restoration: what they draw while they are made would else be drawn twice.
    if validation._combined_loader is None:
        trainer.validating = True  # the loop refuses to be set up in another stage
        validation.setup_data()
        trainer.training = True
    validation._last_val_dl_reload_epoch = last  # Lightning itself would count from the resumption on


def reload_as_due(loop: _FitLoop, last: int | None, *, new_epoch: bool) -> None:
    """Set the loaders up in the epochs where the uninterrupted run would; ``last`` is its ``reloaded``."""
    if last is not None:
        loop._last_train_dl_reload_epoch = last
        if new_epoch:  # a reload may be due, which draws from the generators
            loop.setup_data()
