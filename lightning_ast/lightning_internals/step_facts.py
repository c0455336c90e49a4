"""Facts of a training step that only Lightning's private attributes tell."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

__all__ = ["is_compiled", "loss_scale", "runs_backward", "wrapped_optimizers"]


def loss_scale(trainer: pl.Trainer) -> Tensor | None:
    """Return what 16-bit training multiplies the loss by, on its device; None where nothing scales it."""
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    scale: Tensor | None = getattr(scaler, "_scale", None)  # get_scale() would wait for the device
    return scale


def wrapped_optimizers(trainer: pl.Trainer) -> list[LightningOptimizer]:
    """List the optimizers as ``module.optimizers()`` gives them to a step that optimizes by itself."""
    return list(trainer.strategy._lightning_optimizers)


def is_compiled(module: pl.LightningModule) -> bool:
    """Tell whether the module itself, and not a network inside it, went through ``torch.compile``."""
    return getattr(module, "_compiler_ctx", None) is not None


def runs_backward(trainer: pl.Trainer) -> bool:
    """Tell whether training steps have a backward: in the last epoch of weight averaging they have none."""
    return not trainer.fit_loop._skip_backward
