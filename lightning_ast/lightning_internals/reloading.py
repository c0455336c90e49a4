"""The epochs at which loaders are set up anew: in a resumed run, those of the uninterrupted run."""

from __future__ import annotations

import math

from lightning.pytorch.loops.fit_loop import _FitLoop

__all__ = ["hold_reload", "last_reloads", "reload_as_due", "reload_validation_as_due"]


def last_reloads(loop: _FitLoop) -> dict[str, int | None]:
    """Name the epochs in which the training and the validation loaders were set up, None before."""
    epochs = {
        "reloaded": loop._last_train_dl_reload_epoch,
        "validation_reloaded": loop.epoch_loop.val_loop._last_val_dl_reload_epoch,
    }
    return {name: int(epoch) if math.isfinite(epoch) else None for name, epoch in epochs.items()}


def hold_reload(loop: _FitLoop) -> None:
    """Keep the loaders that a resumed run has just set up until :func:`reload_as_due` decides.

    A reload draws random numbers: it has to wait until the random state is that of the interrupted run.
    """
    loop._last_train_dl_reload_epoch = loop.trainer.current_epoch


def reload_validation_as_due(loop: _FitLoop, last: int | None) -> None:
    """Set the validation loaders up at the epochs where the uninterrupted run would.

    That run has had them since its first validation. They are made here, ahead of the random state's restoration: what
    they draw while they are made would else be drawn twice. Lightning itself would count from the resumption on.
    ``last`` is ``validation_reloaded`` of the checkpoint's :func:`last_reloads`; None for one that has none.
    """
    trainer = loop.trainer
    validation = loop.epoch_loop.val_loop
    if last is None or not trainer.enable_validation:
        return
    if validation._combined_loader is None:
        trainer.validating = True  # the loop refuses to be set up in another stage
        validation.setup_data()
        trainer.training = True
    validation._last_val_dl_reload_epoch = last


def reload_as_due(loop: _FitLoop, last: int | None, *, new_epoch: bool) -> None:
    """Set the loaders up at the epochs where the uninterrupted run would (``reload_dataloaders_every_n_epochs``).

    ``last`` is ``reloaded`` of the checkpoint's :func:`last_reloads`; None for one that has none. Where a new epoch
    begins here, a reload may be due, which draws from the generators.
    """
    if last is not None:
        loop._last_train_dl_reload_epoch = last
        if new_epoch:
            loop.setup_data()
