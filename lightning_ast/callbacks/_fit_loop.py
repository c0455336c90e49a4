"""What mode ``prune`` reads and writes of Lightning's fit loop, private parts included: all of it is in this file."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.loops.fit_loop import _FitLoop

__all__ = [
    "announce_batches",
    "batches_done",
    "begin_new_epoch",
    "on_loader_setup",
    "restart_loader",
]


def on_loader_setup(loop: _FitLoop, install: Callable[[], None]) -> Callable[[], None]:
    """Call ``install`` whenever a training loader was set up, before it is started.

    ``_load_combined_loader_states`` is the last thing that ``setup_data`` does before that: the samplers are final, no
    index is drawn, no worker runs.

    Returns:
        Undoes it.
    """
    load = loop._load_combined_loader_states

    def load_and_install() -> None:
        load()
        install()

    loop._load_combined_loader_states = load_and_install  # type: ignore[method-assign]
    return lambda: loop.__dict__.pop("_load_combined_loader_states", None) and None


def announce_batches(trainer: pl.Trainer, batches: int) -> None:
    """Tell Lightning (limits, validation, progress bars) how many batches the epoch has."""
    trainer.fit_loop.max_batches = batches
    timed = getattr(trainer, "_val_check_time_interval", None) is not None
    if isinstance(trainer.val_check_interval, float) and not timed:
        trainer.val_check_batch = max(1, int(batches * trainer.val_check_interval))


def batches_done(loop: _FitLoop) -> int:
    """Batches of the running epoch that were trained on before the checkpoint; 0 where it is to begin anew."""
    if not loop.restarted_mid_epoch or _finished_a_batch_last(loop):
        return 0
    return int(loop.epoch_loop.batch_progress.current.processed)  # type: ignore[attr-defined]


def _finished_a_batch_last(loop: _FitLoop) -> bool:
    """Whether the checkpoint was written at the end of an epoch's last batch, before the end of the epoch."""
    return loop.epoch_loop.restarted_on_train_batch_end and loop.epoch_loop.batch_progress.is_last_batch


def begin_new_epoch(loop: _FitLoop) -> None:
    """Close the epoch at whose end the checkpoint was written, so that the next one begins as any other does.

    Lightning (2.6) would compare the old epoch's batches with the number of the new one, leave out
    ``on_train_epoch_start``, validate at odd places, and with ``max_steps`` first run a batch of an epoch that is over.
    """
    if _finished_a_batch_last(loop):
        loop.epoch_loop.batch_progress.increment_completed()
        loop.epoch_loop._batches_that_stepped += 1
    elif loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
    else:
        return
    loop.reset_restart_stage()
    loop.epoch_loop.reset_restart_stage()
    for part in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        part._restarting = False


def restart_loader(loop: _FitLoop) -> None:
    """Start the loader again, unless Lightning is going to do so for this epoch."""
    resuming = loop.restarting or getattr(loop, "is_resuming", False)  # the latter is newer than Lightning 2.5.0
    if resuming or loop.trainer.current_epoch == 0:
        assert loop._data_fetcher is not None
        iter(loop._data_fetcher)
