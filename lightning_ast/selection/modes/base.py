"""What a mode does unless it says otherwise: it selects in each batch, and leaves the loader as it is.

Lightning restores weights, optimizers and counters of a resumed run. Here its random state and its place in the data
are restored too, so that it goes on as if it had not stopped. Mode ``prune`` plans its epochs and restores them itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_ast.core.gradient_gate import Execution
from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.fit_loop import loaders, run_length
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
from lightning_ast.mode_facts import Mode
from lightning_ast.schedule import Point, Stage
from lightning_ast.selection.accumulation import AccumulationWindow
from lightning_ast.selection.fit_parts import FitParts
from lightning_ast.selection.gating import Gating
from lightning_ast.selection.step_state import BatchFacts, StepState, Treatment
from lightning_ast.words import changes

__all__ = ["SelectionMode"]


class SelectionMode:
    """What :class:`~lightning_ast.selection.session.Session` asks of a mode, in the order in which it asks."""

    name: ClassVar[Mode]  # the value of SparseSelectionCallback(mode=...)
    execution: ClassVar[Execution] = "mask"  # of the backward behind the gate

    def __init__(self, parts: FitParts, gating: Gating) -> None:
        self._parts = parts
        self._gating = gating
        self._scheduler = parts.settings.scheduler
        self._trainer = parts.trainer
        self._loaded: dict[str, Any] | None = None
        self._unlead: Callable[[], None] | None = None

    def attach(self) -> None:
        """Change what the mode has to change of the module or the trainer, at setup."""

    def start_training(self) -> list[str]:
        """Prepare for the first batch, and find what is wrong with the configuration and is known only now."""
        if self._unlead is not None and self._loaded is not None:
            hold_reload(self._trainer.fit_loop)  # `_begin` decides whether loaders are reloaded
        return [] if self._scheduler is None else self._scheduler.faults(self._trainer, batches_known=True)

    def detach(self) -> None:
        """Leave module and trainer as they were; state can still be asked for. Safe to call twice."""
        self._stop_leading()

    def stage(self, batch_idx: int) -> Stage:
        """Return the stage of a batch: that of the batch with which its optimizer step begins."""
        if self._scheduler is None:
            return "sparse"
        return self._scheduler.stage(self._trainer, AccumulationWindow.first_batch(self._trainer, batch_idx))

    def open_batch(self, stage: Stage, size: int, indices: Tensor | None) -> StepState:
        """Return what is to be done with a batch; its dataset indices are ``(B,)``, where they are known."""
        selects = stage == "sparse" and self._parts.selector.selects
        facts = BatchFacts(size=size, indices=indices, execution=self.execution)
        return StepState(facts, Treatment.SELECTED if selects else Treatment.DENSE)

    def prepare_step(self, step: StepState, batch: Any, batch_idx: int) -> None:
        """Do what comes ahead of the training step; samples that are not finite have been replaced by others."""

    def activation_rate(self, step: StepState) -> float:
        """Return selected / offered of a batch, or of its epoch, in [0, 1]."""
        return step.selected / step.batch_size

    def close_batch(self, step: StepState | None) -> None:
        """Let go of a batch; None stands for one that was not trained on."""

    def coverage(self, step: StepState) -> float | None:
        """Return the share of the significance of a batch, or of its planned epoch, that is trained on, in [0, 1]."""
        # None where a plan is of an older release, which did not know it.
        return self._parts.selector.coverage if step.selects or step.facts.is_planned else 1.0

    def stages_ahead(self, epoch: int) -> list[Stage] | None:
        """List the stages of the epochs from this one on; None in a run without an end that is known."""
        run = run_length(self._trainer)
        if run.epochs is None:
            return None
        schedule = self._parts.settings.schedule_of(self._trainer)
        now = self._trainer.global_step
        middles = (each + 0.5 for each in range(epoch, math.ceil(run.epochs)))
        return [schedule.stage(Point(middle, run.steps_at(middle) or now), run) for middle in middles]

    def state_dict(self) -> dict[str, Any]:
        """Return the mode's part of a checkpoint: primitives and tensors alone; every process must ask for it."""
        reloads = last_reloads(self._trainer.fit_loop)
        random = self._parts.processes.random_states()
        return {"resumption": {"data": self._data(), **reloads, "random": random}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state until the epoch and the position in it are known; that of another mode is passed over."""
        self._loaded = state.get("resumption", self._loaded)

    def expect_resume(self) -> None:
        """Prepare for a checkpoint that is going to be loaded."""
        self._stop_leading()
        self._loaded = None
        self._unlead = lead(self._trainer.fit_loop, load=lambda combined: combined, begin=self._begin)

    def _stop_leading(self) -> None:
        if self._unlead is not None:
            self._unlead()
        self._unlead = None

    def _begin(self, epoch: int) -> None:
        """Restore the state, ahead of the first epoch of the resumed run."""
        # Only here: what a script does before the first batch would use the random states up. A loader that knows its
        # place (torchdata's StatefulDataLoader) goes on within the epoch; another one begins it anew.
        self._stop_leading()
        loop = self._trainer.fit_loop
        state = self._loaded
        if state is None:
            return
        within = batches_done(loop) > 0
        self._check(state["data"], within=within)
        load_loader_states(loop)
        reload_validation_as_due(loop, state.get("validation_reloaded"))
        self._parts.processes.restore_random_states(state["random"])
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
            "number of processes": self._parts.processes.count,
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
