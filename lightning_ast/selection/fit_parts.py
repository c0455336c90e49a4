"""What the parts of one fit share: made once, and handed to each of them; and what other callbacks are told of it."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_ast.core.ledger import Ledger
from lightning_ast.lightning_internals.distributed import Processes
from lightning_ast.schedule import Stage
from lightning_ast.selection.accumulation import AccumulationWindow
from lightning_ast.selection.moving_target import MovingTarget
from lightning_ast.selection.quarantine import Quarantine
from lightning_ast.selection.sample_count import SampleCount
from lightning_ast.selection.settings import SelectionSettings
from lightning_ast.selection.step_state import StepState

__all__ = ["FitParts", "Watcher"]


class Watcher:
    """A part of another callback that is told of what a fit does to each batch; it changes nothing."""

    wants_labels = False  # the classes of the samples, for which losses must be watched in every sparse step

    def start_stage(self, stage: Stage) -> None:
        """Receive the stage of the batch that starts, where it is another than that of the last one."""

    def scoring(self) -> AbstractContextManager[None]:
        """Return a context that is entered around the scoring forward of ``subset``."""
        return nullcontext()

    def indices(self, batch_size: int) -> Tensor | None:
        """Return ``(B,)`` dataset indices of the batch that starts, or None where they are not known."""
        return None

    def finish_batch(self, step: StepState) -> None:
        """Receive the state of a step that was trained on."""


class FitParts:
    """The objects of one fit that several parts of it read; ``owner`` is the selection callback."""

    def __init__(
        self,
        owner: Callback,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        settings: SelectionSettings,
        *,
        ledger: Ledger,
        dense_ops: Counter[str],
    ) -> None:
        self.owner = owner
        self.trainer = trainer
        self.module = module
        self.settings = settings
        self.ledger = ledger
        self.dense_ops = dense_ops
        self.selector = settings.selector(trainer.global_rank)
        target = settings.target
        self.target = MovingTarget(target, self.selector, trainer) if callable(target) else None
        self.processes = Processes(trainer)
        self.quarantine = Quarantine(settings.quarantine_limit, self.processes)
        self.window = AccumulationWindow()
        self.samples = SampleCount(trainer, module)
        self.watchers: list[Watcher] = []
