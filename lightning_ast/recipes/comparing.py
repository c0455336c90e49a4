"""What a fair comparison of methods needs: dense runs that are counted, a random share, one schedule, the work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_ast.callbacks import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.demo.compare import counting
from lightning_ast.demo.models import one_cycle

__all__ = ["QUIET", "Comparison", "StopAfter", "chance", "counting", "one_cycle", "work_share"]

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
"""Options of a Trainer that is run for its figures alone."""


def chance(losses: Tensor, logits: Tensor | None, inputs: Tensor | None, targets: Tensor | None) -> Tensor:
    """Score all samples alike, ``(B,)``, so that the soft gate keeps a random share of them: a baseline."""
    return torch.ones_like(losses)


def work_share(trainer: pl.Trainer, *, length: float = 1.0) -> float:
    """Return the FLOPs of a finished run, scoring included, as a share of the dense run's.

    Args:
        trainer: The trainer of the run, with its ``SparseSelectionCallback``.
        length: The length of the run as a share of the dense run's; below 1 for a shortened run.

    Returns:
        The share; NaN where the FLOPs could not be counted.

    Example:
        >>> import torch, lightning.pytorch as pl
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = pl.Trainer(max_steps=2, accelerator="cpu", callbacks=[counting()], **QUIET)
        >>> trainer.fit(BoringModel())
        >>> work_share(trainer, length=0.5)
        0.5
    """
    selection = next(each for each in trainer.callbacks if isinstance(each, SparseSelectionCallback))  # type: ignore[attr-defined]
    saved = selection.savings["flops"]
    return float("nan") if saved is None else round((1 - saved) * length, 6)


class StopAfter(pl.Callback):
    """Ends a run after some optimizer steps, to see whether it works.

    The Trainer's ``max_steps`` would do so with a learning-rate schedule of that length.

    Args:
        steps: The number of optimizer steps, at least 1.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Ask the Trainer to stop once the steps are done."""
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self._steps


@dataclass(frozen=True)
class Comparison:
    """Runs that differ in the method alone: the same epochs, schedule of the learning rate and data.

    Attributes:
        epochs: The epochs of a dense run. A sparse run trains on everything in the first and in the last one.
        shortened: The length of the method "shortened" as a share of the dense run's: the work of "ours".
        selections: The arguments of ``SparseSelectionCallback`` by method. Other methods are dense, and counted.
    """

    epochs: int
    shortened: float
    selections: Mapping[str, Mapping[str, Any]]

    def trainer(self, method: str, batches: int, *, max_steps: int = -1, **options: Any) -> pl.Trainer:
        """Make the trainer of a method.

        Args:
            method: The method; "shortened" is dense training for fewer steps.
            batches: The batches of an epoch.
            max_steps: The optimizer steps after which the run is cut off, to see whether it works; -1 is never.
            options: Further options of the trainer.
        """
        callbacks: list[pl.Callback] = [counting()]
        if method in self.selections:
            stages = TwoStageScheduler(warmup_epochs=1, cooldown_epochs=1)
            callbacks = [SparseSelectionCallback(**self.selections[method]), stages]
        length = round(self.shortened * self.epochs * batches) if method == "shortened" else -1
        if max_steps >= 0:
            callbacks.append(StopAfter(max_steps))
        return pl.Trainer(max_epochs=self.epochs, max_steps=length, callbacks=callbacks, **QUIET, **options)

    def work(self, method: str, trainer: pl.Trainer) -> float:
        """Return the FLOPs of a finished run as a share of the dense run's, see ``work_share``."""
        return work_share(trainer, length=self.shortened if method == "shortened" else 1)
