"""What a mode does unless it says otherwise: it selects in each batch, and leaves the loader as it is."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from lightning_ast.core.gradient_gate import Execution
from lightning_ast.lightning_internals.run_limits import run_length
from lightning_ast.mode_facts import Mode
from lightning_ast.schedule import Point, Stage
from lightning_ast.selection.accumulation import AccumulationWindow
from lightning_ast.selection.fit_parts import FitParts
from lightning_ast.selection.gating import Gating
from lightning_ast.selection.resume import Resumption
from lightning_ast.selection.step_state import BatchFacts, StepState, Treatment

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
        self._resumption = Resumption(parts.trainer, parts.processes)

    def attach(self) -> None:
        """Change what the mode has to change of the module or the trainer, at setup."""

    def start_training(self) -> list[str]:
        """Prepare for the first batch, and find what is wrong with the configuration and is known only now."""
        self._resumption.start_training()
        return [] if self._scheduler is None else self._scheduler.faults(self._trainer, batches_known=True)

    def detach(self) -> None:
        """Leave module and trainer as they were; state can still be asked for. Safe to call twice."""
        self._resumption.detach()

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
        return {"resumption": self._resumption.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a state was made; that of another mode is passed over."""
        if "resumption" in state:
            self._resumption.load_state_dict(state["resumption"])

    def expect_resume(self) -> None:
        """Prepare for a checkpoint that is going to be loaded."""
        self._resumption.expect()
