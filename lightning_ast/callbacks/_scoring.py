"""Scoring inside Lightning: the user's own step as far as its loss, with nothing logged, updated or drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_ast.core.losses import LossCapture, LossCaptureError, LossReached, LossRecord, check_losses
from lightning_ast.core.scoring import TracelessForward

__all__ = ["ScoringPass"]


class ScoringPass:
    """Per-sample losses of a batch by a forward without gradient.

    Args:
        module: the bare LightningModule, also under DDP: nothing is synchronised but SyncBatchNorm's own statistics.
        training_step: the module's own, not intercepted.
        per_sample_loss: the module's own, or None to run ``training_step`` as far as its loss.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        *,
        training_step: Callable[..., Any],
        per_sample_loss: Callable[..., Any] | None,
    ) -> None:
        self._module = module
        self._training_step = training_step
        self._per_sample_loss = per_sample_loss
        self._takes_index = is_param_in_hook_signature(training_step, "batch_idx", min_args=2)
        self._traceless = TracelessForward(module)
        self._metrics = [child for child in module.modules() if isinstance(child, (Metric, MetricCollection))]

    def __call__(self, batch: Any, batch_idx: int, batch_size: int) -> tuple[Tensor, LossRecord | None] | None:
        """Score a batch.

        Returns:
            ``(B,)`` losses, and what they were computed from where that is known; None where the step returns None
            before any loss: it skips this batch.

        Raises:
            LossCaptureError: the losses cannot be had; the message names the remedy.
        """
        context = self._module.trainer.precision_plugin.forward_context()
        with isolate_rng(include_cuda=False), self._nothing_recorded(), self._traceless(), context:
            if self._per_sample_loss is not None:
                with LossCapture(batch_size, unreduced=True) as capture, _gradient_named():
                    losses = check_losses(self._per_sample_loss(batch, batch_idx), batch_size)
                return losses, capture.records[0] if len(capture.records) == 1 else None
            output: Any = _MISSING
            with LossCapture(batch_size, stop=True) as capture, suppress(LossReached), _gradient_named():
                output = self._training_step(*((batch, batch_idx) if self._takes_index else (batch,)))
            if output is None and not capture.records:
                return None
        if not capture.records and self._metrics:
            raise LossCaptureError(
                "no torch loss function was called in the training step outside a torchmetrics metric, and metrics are "
                "held still while scoring: where one of them computes the loss, use mode='partial', or define "
                "`per_sample_loss(self, batch, batch_idx)`."
            )
        record = capture.record()
        return record.losses, record

    @contextmanager
    def _nothing_recorded(self) -> Iterator[None]:
        """``self.log`` does nothing; torchmetrics neither update nor compute: they answer 0."""
        stubs: list[tuple[Any, str, Any]] = [(self._module, "log", _nothing), (self._module, "log_dict", _nothing)]
        for metric in self._metrics:
            answer = partial(
                _answer, torch.zeros(()) if isinstance(metric, Metric) else dict.fromkeys(metric.keys(), 0.0)
            )
            stubs += [(metric, "forward", answer), (metric, "update", _nothing), (metric, "compute", answer)]
        saved = [(owner, name, owner.__dict__.get(name, _MISSING)) for owner, name, _ in stubs]
        try:
            for owner, name, stub in stubs:
                owner.__dict__[name] = stub
            yield
        finally:
            for owner, name, value in saved:
                if value is _MISSING:
                    del owner.__dict__[name]
                else:
                    owner.__dict__[name] = value


_MISSING = object()
_NO_GRAPH = ("does not require grad", "doesn't require gradient", "not have been used in the graph")


@contextmanager
def _gradient_named() -> Iterator[None]:
    """Say that scoring runs without gradient where a step differentiates by itself."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_GRAPH):
            raise
        raise LossCaptureError(
            f"mode='subset' scores the whole batch without gradient first, and the step differentiates before its loss "
            f"({error}): put that part under `with torch.enable_grad():`, or use mode='partial', 'mask' or 'prune'."
        ) from error


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _answer(value: Any, *_: Any, **__: Any) -> Any:
    return value
