"""Where a resumed run continues: random state and place in the data, checked against what the checkpoint was made with.

For the modes that leave the loader alone. Mode ``prune`` plans its epochs and restores them itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.distributed import Processes
from lightning_ast.lightning_internals.fit_loop import loaders
from lightning_ast.lightning_internals.leading import lead
from lightning_ast.lightning_internals.resuming import (
    batches_done,
    begin_new_epoch,
    hold_reload,
    last_reloads,
    load_loader_states,
    reload_as_due,
    reload_validation_as_due,
    restart_loader,
)
from lightning_ast.words import changes

__all__ = ["Resumption"]


class Resumption:
    """Continues a run as if it had not stopped, where Lightning restores weights, optimizers and counters alone."""

    def __init__(self, trainer: pl.Trainer, processes: Processes) -> None:
        self._trainer = trainer
        self._processes = processes
        self._loaded: dict[str, Any] | None = None
        self._undo: Callable[[], None] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data and the random state; every process must ask for it."""
        return {"data": self._data(), **last_reloads(self._trainer.fit_loop), "random": self._processes.random_states()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state until the epoch and the position in it are known."""
        self._loaded = state

    def expect(self) -> None:
        """Prepare for a checkpoint that is being loaded."""
        self.detach()
        self._loaded = None
        self._undo = lead(self._trainer.fit_loop, load=lambda combined: combined, begin=self._begin)

    def start_training(self) -> None:
        """Leave the decision whether loaders are reloaded to :meth:`_begin`."""
        if self._undo is not None and self._loaded is not None:
            hold_reload(self._trainer.fit_loop)

    def detach(self) -> None:
        """Leave the trainer as it was. Safe to call twice."""
        if self._undo is not None:
            self._undo()
        self._undo = None

    def _begin(self, epoch: int) -> None:
        """Restore the state, ahead of the first epoch of the resumed run."""
        # Only here: what a script does before the first batch would use the random states up. A loader that knows its
        # place (torchdata's StatefulDataLoader) goes on within the epoch; another one begins it anew.
        self.detach()
        loop = self._trainer.fit_loop
        state = self._loaded
        if state is None:
            return
        within = batches_done(loop) > 0
        self._check(state["data"], within=within)
        load_loader_states(loop)
        reload_validation_as_due(loop, state.get("validation_reloaded"))
        self._processes.restore_random_states(state["random"])
        if not within:
            begin_new_epoch(loop)
        reload_as_due(loop, state["reloaded"], new_epoch=not within)
        if not within:
            restart_loader(loop)

    def _data(self) -> dict[str, Any]:
        """Return what a place in an epoch depends on."""
        found = loaders(self._trainer.fit_loop)
        return {
            "batch size": [_batch_size(loader) for loader in found],
            "data set length": [_length(getattr(loader, "dataset", None)) for loader in found],
            "number of processes": self._processes.count,
        }

    def _check(self, saved: dict[str, Any], *, within: bool) -> None:
        changed = changes(saved, self._data(), _said)
        if changed and within:
            raise ConfigurationError(
                f"this checkpoint was written in the middle of an epoch: {', '.join(changed)}. The same place in "
                "the epoch does not exist: use the same settings, or a checkpoint from an epoch's end."
            )
        if changed:
            rank_zero_info(f"lightning-ast: resumed with other data: {', '.join(changed)}. It counts from here on.")


def _batch_size(loader: object) -> int | None:
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) and size > 0 else None


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def _said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
