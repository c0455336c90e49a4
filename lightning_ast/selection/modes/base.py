"""What a mode is: how the selections of a fit are executed, and what the loader gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_ast.core.gradient_gate import Execution
from lightning_ast.core.selector import SampleSelector
from lightning_ast.lightning_internals.distributed import Processes
from lightning_ast.lightning_internals.run_limits import run_length
from lightning_ast.mode_facts import Mode
from lightning_ast.schedule import Stage
from lightning_ast.selection.accumulation import AccumulationWindow
from lightning_ast.selection.decision import Decision
from lightning_ast.selection.gating import Gating
from lightning_ast.selection.observer import Watcher
from lightning_ast.selection.resume import Resumption
from lightning_ast.selection.settings import SelectionSettings
from lightning_ast.selection.stages import stage_of_batch, stages_from
from lightning_ast.selection.step_state import BatchFacts, StepState, Treatment

__all__ = ["FitParts", "SelectionMode"]


@dataclass(frozen=True, kw_only=True)
class FitParts:
    """The parts of a fit that a mode works with.

    Attributes:
        owner: The selection callback.
        trainer: The trainer of the fit.
        module: The LightningModule that is trained.
        settings: What the fit selects by.
        selector: The gate, its controller and its target.
        processes: The distributed processes of the run.
        watchers: The other callbacks that are told of each batch.
    """

    owner: Callback
    trainer: pl.Trainer
    module: pl.LightningModule
    settings: SelectionSettings
    selector: SampleSelector
    processes: Processes
    watchers: list[Watcher]


class SelectionMode:
    """A mode that selects within each batch and leaves the loader to the user: what most modes have in common.

    A mode overrides what it does otherwise. :class:`~lightning_ast.selection.session.Session` calls the methods in the
    order in which they stand here; every one but ``attach`` and ``start_training`` is called again for each batch, or
    for each checkpoint.

    Args:
        parts: The parts of the fit.

    Attributes:
        name: The value of ``SparseSelectionCallback(mode=...)``.
        execution: How the backward behind the gate is computed.
        always_scores: Whether the significance is wanted even where nothing is selected.
    """

    name: ClassVar[Mode]
    execution: ClassVar[Execution] = "mask"
    always_scores: ClassVar[bool] = False

    def __init__(self, parts: FitParts) -> None:
        self._parts = parts
        self._resumption = Resumption(parts.trainer, parts.processes)

    # ------------------------------------------------------------------ the fit

    def attach(self) -> None:
        """Change what the mode has to change of the module or the trainer, at setup."""

    def detach(self) -> None:
        """Leave module and trainer as they were; state can still be asked for. Safe to call twice."""
        self._resumption.detach()

    def wrap(self) -> None:
        """Wrap the training step, if the mode needs that."""

    def unwrap(self) -> None:
        """Take the wrapper off. Safe to call twice."""

    def start_training(self, gating: Gating, decision: Decision) -> list[str]:
        """Prepare for the first batch; everything that Lightning sets up is there.

        Returns:
            What is wrong with the configuration and is known only now.
        """
        self._resumption.start_training()
        return self._parts.settings.schedule.length_faults(run_length(self._parts.trainer), batches_known=True)

    # ------------------------------------------------------------------ a batch

    def stage(self, batch_idx: int) -> Stage:
        """Return the stage of a batch."""
        schedule = self._parts.settings.schedule
        if not schedule.dense:
            return "sparse"
        trainer = self._parts.trainer
        first = AccumulationWindow.first_batch(trainer, batch_idx)  # a stage begins with an optimizer step
        return stage_of_batch(schedule, trainer, first)

    def open_batch(self, stage: Stage, size: int, indices: Tensor | None) -> StepState:
        """Return what is to be done with a batch.

        Args:
            stage: The stage of the batch.
            size: The number B of its samples.
            indices: ``(B,)`` dataset indices, or None where they are not known.
        """
        sparse = stage == "sparse" and self._parts.selector.target_activation_rate < 1
        facts = BatchFacts(size=size, indices=indices, execution=self.execution)
        return StepState(facts, Treatment.SELECTED if sparse else Treatment.DENSE)

    def prepare_step(self, step: StepState, batch: Any, batch_idx: int) -> None:
        """Do what comes ahead of the training step; samples that are not finite have been replaced by others."""

    def close_batch(self, step: StepState | None) -> None:
        """Let go of a batch; None stands for one that was not trained on."""

    def activation_rate(self, step: StepState) -> float:
        """Return selected / offered of a batch, in [0, 1]."""
        return step.selected / step.batch_size

    # ------------------------------------------------------------------ the run

    def stages_ahead(self, epoch: int) -> list[Stage] | None:
        """List the stages of the epochs from this one on; None in a run without an end that is known."""
        return stages_from(epoch, self._parts.settings.schedule, self._parts.trainer)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the mode's part of a checkpoint: primitives and tensors alone; every process must ask for it."""
        return {"resumption": self._resumption.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a state was made; that of another mode is passed over."""
        if "resumption" in state:
            self._resumption.load_state_dict(state["resumption"])

    def expect_resume(self) -> None:
        """Prepare for a checkpoint that is going to be loaded."""
        self._resumption.expect()
