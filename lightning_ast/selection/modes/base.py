"""What a mode is: the methods that a session calls, and the parts of a fit that it works with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_ast.core.gradient_gate import Execution
from lightning_ast.core.selector import SampleSelector
from lightning_ast.lightning_internals.distributed import Processes
from lightning_ast.mode_facts import Mode
from lightning_ast.schedule import Stage
from lightning_ast.selection.decision import Decision
from lightning_ast.selection.gating import Gating
from lightning_ast.selection.moving_target import MovingTarget
from lightning_ast.selection.settings import SelectionSettings
from lightning_ast.selection.step_state import StepState
from lightning_ast.selection.watcher import Watcher

__all__ = ["FitParts", "SelectionMode"]


@dataclass(frozen=True, kw_only=True)
class FitParts:
    """The parts of a fit that a mode works with; ``owner`` is the selection callback."""

    owner: Callback
    trainer: pl.Trainer
    module: pl.LightningModule
    settings: SelectionSettings
    selector: SampleSelector
    processes: Processes
    watchers: list[Watcher]
    decision: Decision
    gating: Gating
    target: MovingTarget | None


class SelectionMode(ABC):
    """What :class:`~lightning_ast.selection.session.Session` asks of a mode, in the order in which it asks."""

    name: ClassVar[Mode]  # the value of SparseSelectionCallback(mode=...)
    execution: ClassVar[Execution] = "mask"  # of the backward behind the gate

    def __init__(self, parts: FitParts) -> None:
        self._parts = parts

    @abstractmethod
    def attach(self) -> None:
        """Change what the mode has to change of the module or the trainer, at setup."""

    @abstractmethod
    def start_training(self) -> list[str]:
        """Prepare for the first batch, and find what is wrong with the configuration and is known only now."""

    @abstractmethod
    def detach(self) -> None:
        """Leave module and trainer as they were; state can still be asked for. Safe to call twice."""

    @abstractmethod
    def stage(self, batch_idx: int) -> Stage:
        """Return the stage of a batch."""

    @abstractmethod
    def open_batch(self, stage: Stage, size: int, indices: Tensor | None) -> StepState:
        """Return what is to be done with a batch; its dataset indices are ``(B,)``, where they are known."""

    def prepare_step(self, step: StepState, batch: Any, batch_idx: int) -> None:  # noqa: B027 - most modes need none
        """Do what comes ahead of the training step; samples that are not finite have been replaced by others."""

    @abstractmethod
    def activation_rate(self, step: StepState) -> float:
        """Return selected / offered of a batch, or of its epoch, in [0, 1]."""

    def close_batch(self, step: StepState | None) -> None:  # noqa: B027
        """Let go of a batch; None stands for one that was not trained on."""

    def coverage(self, step: StepState) -> float | None:
        """Return the share of the significance of a batch, or of its planned epoch, that is trained on, in [0, 1]."""
        # None where a plan is of an older release, which did not know it.
        return self._parts.selector.coverage if step.selects or step.facts.is_planned else 1.0

    @abstractmethod
    def stages_ahead(self, epoch: int) -> list[Stage] | None:
        """List the stages of the epochs from this one on; None in a run without an end that is known."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the mode's part of a checkpoint: primitives and tensors alone; every process must ask for it."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a state was made; that of another mode is passed over."""

    @abstractmethod
    def expect_resume(self) -> None:
        """Prepare for a checkpoint that is going to be loaded."""
