"""The losses of one run of a training step: those of torch's loss functions, and of a module's own per_sample_loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_ast.core.losses.capture import LossCapture, LossRecord, combine
from lightning_ast.errors import LossCaptureError
from lightning_ast.lightning_internals.class_patch import put_on
from lightning_ast.mixin import overrides

__all__ = ["StepLosses"]

_NAME = "per_sample_loss"


class StepLosses:
    """Watches the losses of a training step while it is entered; what they return is not changed."""

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        self._capture = LossCapture()
        self._unwatch: Callable[[], None] | None = None
        self._own: Tensor | None = None

    def __enter__(self) -> StepLosses:
        """Start to watch."""
        self._capture.__enter__()
        if overrides(self._module, _NAME):
            original = getattr(self._module, _NAME)

            def watched(*args: Any, **kwargs: Any) -> Any:
                losses = original(*args, **kwargs)
                self._own = losses if self._own is None else self._own
                return losses

            self._unwatch = put_on(self._module, _NAME, watched)
        return self

    def __exit__(self, *error: object) -> None:
        """Stop watching."""
        if self._unwatch is not None:
            self._unwatch()
        self._unwatch = None
        self._capture.__exit__(*error)

    def labels(self, batch_size: int) -> Tensor | None:
        """Give the classes ``(B,)`` of the samples; None where no loss function was told them."""
        return self._capture.labels(batch_size)

    def record(self, loss: Tensor, batch_size: int, *, scale: Any = 1.0) -> LossRecord:
        """Give the losses of the samples, and what they were computed from."""
        if self._own is None:
            return combine(self._capture, loss, batch_size, scale=scale)
        losses = self._own
        if not isinstance(losses, Tensor) or losses.shape != (batch_size,):
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise LossCaptureError(
                f"per_sample_loss must return the losses of the {batch_size} samples, shape ({batch_size},), got {got}."
            )
        losses = losses.detach()
        try:
            return replace(combine(self._capture, loss, batch_size, scale=scale), losses=losses)
        except LossCaptureError:
            return LossRecord("a per_sample_loss without classes", losses, None, None, "regression")

    def clear(self) -> None:
        """Let go of the losses, and of the graph that they keep alive."""
        self._own = None
        self._capture.clear()
