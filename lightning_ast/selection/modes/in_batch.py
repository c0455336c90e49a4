"""What ``mask``, ``partial`` and ``subset`` have in common: they select in each batch; the loader is the user's own."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lightning_ast.lightning_internals.run_limits import run_length
from lightning_ast.run_length import Point
from lightning_ast.schedule import Stage
from lightning_ast.selection.accumulation import AccumulationWindow
from lightning_ast.selection.modes.base import FitParts, SelectionMode
from lightning_ast.selection.resume import Resumption
from lightning_ast.selection.step_state import BatchFacts, StepState, Treatment

__all__ = ["InBatchMode"]


class InBatchMode(SelectionMode):
    """Selects within each batch of the sparse stage."""

    def __init__(self, parts: FitParts) -> None:
        super().__init__(parts)
        self._scheduler = parts.settings.scheduler
        self._trainer = parts.trainer
        self._resumption = Resumption(parts.trainer, parts.processes)

    def attach(self) -> None:
        """Change nothing."""

    def start_training(self) -> list[str]:
        """Find what is wrong with the schedule, now that the length of an epoch is known."""
        self._resumption.start_training()
        return [] if self._scheduler is None else self._scheduler.faults(self._trainer, batches_known=True)

    def detach(self) -> None:
        """Leave the trainer as it was. Safe to call twice."""
        self._resumption.detach()

    def stage(self, batch_idx: int) -> Stage:
        """Return the stage of a batch: that of the batch with which its optimizer step begins."""
        if self._scheduler is None:
            return "sparse"
        return self._scheduler.stage(self._trainer, AccumulationWindow.first_batch(self._trainer, batch_idx))

    def open_batch(self, stage: Stage, size: int, indices: Tensor | None) -> StepState:
        """Return what is to be done with a batch: select from it in the sparse stage."""
        selects = stage == "sparse" and self._parts.selector.selects
        facts = BatchFacts(size=size, indices=indices, execution=self.execution)
        return StepState(facts, Treatment.SELECTED if selects else Treatment.DENSE)

    def activation_rate(self, step: StepState) -> float:
        """Return selected / offered of a batch, in [0, 1]."""
        return step.selected / step.batch_size

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
        """Return the place in the data and the random state of all processes."""
        return {"resumption": self._resumption.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the place that a state holds; that of another mode is passed over."""
        if "resumption" in state:
            self._resumption.load_state_dict(state["resumption"])

    def expect_resume(self) -> None:
        """Prepare for a checkpoint that is going to be loaded."""
        self._resumption.expect()
