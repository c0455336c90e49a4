"""The selector of a fit, made from the settings of its callbacks."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_ast.callbacks.two_stage import TwoStageScheduler
from lightning_ast.core.execution import resolve_weighting
from lightning_ast.core.selector import SampleSelector

__all__ = ["selector_of"]


def selector_of(callback: Any, trainer: pl.Trainer, schedule: TwoStageScheduler | None) -> SampleSelector:
    """Make the selector of a fit.

    Args:
        callback: The ``SparseSelectionCallback``.
        trainer: The trainer of the fit.
        schedule: The trainer's ``TwoStageScheduler``, whose own target counts, or None.
    """
    return SampleSelector(
        target_activation_rate=getattr(schedule, "target_activation_rate", None) or callback.target_activation_rate,
        gate=callback.gate,
        weighting=resolve_weighting(callback.weighting, mode=callback.mode, gate=callback.gate),
        controller=callback.controller,
        min_selected=callback.min_selected,
        seed=callback.seed,
        rank=0 if callback.mode == "prune" else trainer.global_rank,
    )
