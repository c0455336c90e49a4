"""What mode ``prune`` reads and writes of Lightning's fit loop, private parts included: all of it is in this file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.utilities import CombinedLoader

from lightning_ast.lightning_internals.class_patch import change_class

__all__ = [
    "announce_batches",
    "batches_done",
    "batches_handed",
    "begin_new_epoch",
    "hold_reload",
    "last_reloads",
    "lead",
    "load_loader_states",
    "loaders",
    "logged_step",
    "reload_as_due",
    "reload_validation_as_due",
    "restart_loader",
    "runs_backward",
    "written_within",
]


C = TypeVar("C")


@dataclass(frozen=True, eq=False)
class _Leader:
    load: Callable[[CombinedLoader], CombinedLoader]
    begin: Callable[[int], None]


_led: WeakKeyDictionary[_FitLoop, tuple[list[_Leader], Callable[[], None]]] = WeakKeyDictionary()
"""By loop: those that lead it, the first one first, and what puts its class back."""


def lead(
    loop: _FitLoop, *, load: Callable[[CombinedLoader], CombinedLoader], begin: Callable[[int], None]
) -> Callable[[], None]:
    """Choose what the fit loop fetches its batches from, and be told of each epoch ahead of every callback.

    Lightning gives its data fetcher the user's loaders after the samplers are final and before an index is drawn or a
    worker runs. Only what the fetcher gets is replaced: ``trainer.train_dataloader`` stays the user's, and may be
    looked into at any time. The loop has a class of its own until it is undone. Several may lead it, each fetches from
    what those before it made, and they may be undone in any order.

    Args:
        loop: of the trainer.
        load: from the user's loaders to those that are fetched from, whenever they are set up.
        begin: told the number of the epoch that is about to run, its loaders set up.

    Returns:
        Undoes it.
    """
    if loop not in _led:
        leaders: list[_Leader] = []
        _led[loop] = leaders, _follow(loop, leaders)
    leaders, put_back = _led[loop]
    leader = _Leader(load, begin)
    leaders.append(leader)

    def undo() -> None:
        leaders.remove(leader)
        if not leaders:
            put_back()
            del _led[loop]

    return undo


def _follow(loop: _FitLoop, leaders: list[_Leader]) -> Callable[[], None]:
    own = type(loop)

    def fetcher(self: _FitLoop) -> Any:
        return self.__dict__["_data_fetcher"]

    def set_fetcher(self: _FitLoop, value: Any) -> None:
        last, self.__dict__["_data_fetcher"] = self.__dict__["_data_fetcher"], value
        if value is not None:
            value.setup = lambda combined: set_up(value, last, combined)

    def set_up(fetcher: Any, last: Any, loaded: CombinedLoader) -> None:
        del fetcher.setup  # Lightning's own again
        for leader in leaders:
            loaded = leader.load(loaded)
        if last is not None and last._combined_loader is not loaded:
            last.combined_loader.reset()  # else its workers live until they are garbage, collected perhaps in another
            last.iterator = None
        fetcher.setup(loaded)

    def on_advance_start(self: _FitLoop) -> None:
        self.setup_data()  # anew where they are to be reloaded; Lightning's own call then finds it done
        assert self._combined_loader is not None
        epoch = self.epoch_progress.current.processed  # type: ignore[attr-defined]
        for loader in self._combined_loader.flattened:
            _set_sampler_epoch(loader, epoch)
        for leader in leaders:
            leader.begin(epoch)
        own.on_advance_start(self)

    return change_class(loop, {"_data_fetcher": property(fetcher, set_fetcher), "on_advance_start": on_advance_start})


def announce_batches(trainer: pl.Trainer, batches: int) -> None:
    """Tell Lightning (limits, validation, progress bars) how many batches the epoch has."""
    trainer.fit_loop.max_batches = batches
    timed = getattr(trainer, "_val_check_time_interval", None) is not None
    if not timed and isinstance(trainer.val_check_interval, float):
        trainer.val_check_batch = max(1, int(batches * trainer.val_check_interval))


def loaders(loop: _FitLoop) -> list[Any]:
    """The user's loaders, as Lightning has set them up; none before."""
    return [] if loop._combined_loader is None else list(loop._combined_loader.flattened)


def batches_handed(loop: _FitLoop) -> int:
    """Batches that the loop was given since its loader was started last, skipped ones and the running one included."""
    fetcher: Any = loop._data_fetcher
    return int(fetcher.fetched) - len(getattr(fetcher, "batches", ()))


def logged_step(loop: _FitLoop) -> int:
    """The step that Lightning's loggers give to what is logged at an epoch's end."""
    return max(loop.epoch_loop._batches_that_stepped - 1, 0)


def batches_done(loop: _FitLoop) -> int:
    """Batches of the running epoch that were trained on before the checkpoint; 0 where it is to begin anew."""
    if not loop.restarted_mid_epoch or _finished_a_batch_last(loop):
        return 0
    return int(loop.epoch_loop.batch_progress.current.processed)  # type: ignore[attr-defined]


def written_within(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint was written in the midst of an epoch."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    return bool(progress) and not progress["is_last_batch"] and progress["current"]["ready"] > 0


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
    they draw while they are made would else be drawn twice.

    Args:
        loop: The fit loop, whose Lightning would count from the resumption on.
        last: ``validation_reloaded`` of the checkpoint's :func:`last_reloads`; None for one that has none.
    """
    trainer, validation = loop.trainer, loop.epoch_loop.val_loop
    if last is None or not trainer.enable_validation:
        return
    if validation._combined_loader is None:
        trainer.validating = True
        validation.setup_data()
        trainer.training = True
    validation._last_val_dl_reload_epoch = last


def reload_as_due(loop: _FitLoop, last: int | None, *, new_epoch: bool) -> None:
    """Set the loaders up at the epochs where the uninterrupted run would (``reload_dataloaders_every_n_epochs``).

    Args:
        loop: whose Lightning would count from the resumption on.
        last: ``reloaded`` of the checkpoint's :func:`last_reloads`.
        new_epoch: whether an epoch begins here: a reload may be due, which draws from the generators.
    """
    if last is not None:
        loop._last_train_dl_reload_epoch = last
        if new_epoch:
            loop.setup_data()


def load_loader_states(loop: _FitLoop) -> None:
    """Bring loaders that know their place to it, where Lightning has not.

    It (2.6) does so when it sets them up, for checkpoints from the midst of an epoch; and
    ``estimated_stepping_batches`` in ``configure_optimizers`` sets them up before the checkpoint is read.
    """
    if loop._combined_loader_states_to_load:
        assert loop._combined_loader is not None
        assert loop._data_fetcher is not None
        loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
        loop._combined_loader_states_to_load = []
        iter(loop._data_fetcher)


def restart_loader(loop: _FitLoop) -> None:
    """Start the loader again, unless Lightning is going to do so for this epoch."""
    resuming = loop.restarting or getattr(loop, "is_resuming", False)  # the latter is newer than Lightning 2.5.0
    if resuming or loop.trainer.current_epoch == 0:
        assert loop._data_fetcher is not None
        iter(loop._data_fetcher)


def runs_backward(loop: _FitLoop) -> bool:
    """Tell whether training steps have a backward: in the last epoch of weight averaging they have none."""
    return not loop._skip_backward
