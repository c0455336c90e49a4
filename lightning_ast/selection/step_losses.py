"""The losses of one run of a training step: those of torch's loss functions, and of a module's own per_sample_loss."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_ast.core.losses.capture import LossCapture, LossRecord, check_losses, combine
from lightning_ast.errors import LossCaptureError
from lightning_ast.lightning_internals.class_patch import put_on
from lightning_ast.mixin import overrides

__all__ = ["StepLosses"]

_NAME = "per_sample_loss"


class StepLosses(LossCapture):
    """Watches the losses of a training step while it is entered; what they return is not changed."""

    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__()
        self._module = module
        self._undo = ExitStack()
        self._own: Tensor | None = None

    def __enter__(self) -> StepLosses:
        super().__enter__()
        if overrides(self._module, _NAME):
            original = getattr(self._module, _NAME)

            def watched(*args: Any, **kwargs: Any) -> Any:
                losses = original(*args, **kwargs)
                self._own = losses if self._own is None else self._own
                return losses

            self._undo.callback(put_on(self._module, _NAME, watched))
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()
        super().__exit__(*error)

    def combined(self, loss: Tensor, batch_size: int, *, scale: Any = 1.0) -> LossRecord:
        """Give the losses of the samples, and what they were computed from."""
        if self._own is None:
            return combine(self, loss, batch_size, scale=scale)
        losses = check_losses(self._own, batch_size).detach()
        try:
            return replace(combine(self, loss, batch_size, scale=scale), losses=losses)
        except LossCaptureError:
            return LossRecord("a per_sample_loss without classes", losses, None, None, "regression")

    def clear(self) -> None:
        """Let go of the losses, and of the graph that they keep alive."""
        self._own = None
        super().clear()
