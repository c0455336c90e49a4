"""``SparseTrainingMonitor``: what a person looks at. One line an epoch, in the original scripts' form."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar, TQDMProgressBar
from torch import Tensor

from lightning_ast.callbacks.sparse_selection import SparseSelectionCallback

__all__ = ["SparseTrainingMonitor", "format_epoch"]


def format_epoch(
    epoch: int,
    max_epochs: int | None,
    *,
    loss: float | None,
    accuracy: float | None,
    activation_rate: float,
    flops_savings: float | None = None,
) -> str:
    """One line for a finished epoch; what is not known is left out.

    Args:
        epoch: number of the epoch, from 1.
        max_epochs: number of epochs in the run, or None where it is open-ended.
        loss: mean training loss of the epoch.
        accuracy: validation accuracy in [0, 1].
        activation_rate: selected / offered in this epoch, in [0, 1]. ``Save`` is its complement: samples, not compute.
        flops_savings: share of FLOPs saved in this epoch, at most 1.

    Example:
        >>> format_epoch(1, 40, loss=1.7234, accuracy=0.365, activation_rate=0.081)
        'Epoch 1/40 | Loss: 1.7234 | Val Acc: 36.50% | Act: 8.1% | Save: 91.9%'
    """
    fields = [f"Epoch {epoch}" if max_epochs is None else f"Epoch {epoch}/{max_epochs}"]
    if loss is not None:
        fields.append(f"Loss: {loss:.4f}")
    if accuracy is not None:
        fields.append(f"Val Acc: {accuracy:.2%}")
    fields += [f"Act: {activation_rate:.1%}", f"Save: {1 - activation_rate:.1%}"]
    if flops_savings is not None:
        fields.append(f"FLOPs saved: {flops_savings:.1%}")
    return " | ".join(fields)


class SparseTrainingMonitor(Callback):
    """Prints ``Epoch 1/40 | Loss: 1.7234 | Val Acc: 36.50% | Act: 8.1% | Save: 91.9%`` after each training epoch.

    ``Loss`` is the mean of what ``training_step`` returned (the full batches' loss), ``Act`` and ``Save`` count
    samples;
    the share of FLOPs saved stands behind them where it is known. Works in dense runs too: they activate 100 %.
    It prints through the progress bar, on rank 0, once an epoch; in between it only adds up a tensor.

    Args:
        accuracy: name of the logged validation accuracy; None takes the first logged name with ``acc`` in it that
            belongs to validation (``val``, ``valid``), and leaves the field out where there is none.

    Example:
        >>> SparseTrainingMonitor(accuracy="val_acc").accuracy
        'val_acc'
    """

    def __init__(self, *, accuracy: str | None = None) -> None:
        super().__init__()
        self.accuracy = accuracy
        self._loss_sum: Tensor | None = None
        self._steps = 0
        self._before = (0, 0, 0.0, 0.0)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start adding up with an epoch's first batch; the hook for its start is not called after every resume."""
        if batch_idx == 0:
            self._loss_sum, self._steps = None, 0
            self._before = _totals(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the step's loss, without waiting for the device."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            loss = loss.detach().float()
            self._loss_sum = loss if self._loss_sum is None else self._loss_sum.to(loss.device) + loss
            self._steps += 1

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the line."""
        if not trainer.is_global_zero:
            return
        offered, selected, spent, dense = (now - then for now, then in zip(_totals(trainer), self._before, strict=True))
        # Lightning divides the step's output by the accumulation; the line shows the user's own loss
        scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        line = format_epoch(
            trainer.current_epoch + 1,
            trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None,
            loss=None if self._loss_sum is None else float(self._loss_sum) * scale / self._steps,
            accuracy=self._accuracy(trainer),
            activation_rate=selected / offered if offered else 1.0,
            flops_savings=1 - spent / dense if dense else None,
        )
        bar = trainer.progress_bar_callback
        if isinstance(bar, (TQDMProgressBar, RichProgressBar)) and bar.is_enabled:
            bar.print(line)
        else:
            print(line)  # noqa: T201 - the terminal is what this callback is for

    def state_dict(self) -> dict[str, Any]:
        """So that an epoch that was interrupted in its middle is summed up whole."""
        loss = None if self._loss_sum is None else float(self._loss_sum)
        return {"loss_sum": loss, "steps": self._steps, "before": list(self._before)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue in the epoch the checkpoint was written in."""
        loss, self._steps = state_dict["loss_sum"], state_dict["steps"]
        self._loss_sum = None if loss is None else torch.tensor(loss)
        offered, selected, spent, dense = state_dict["before"]
        self._before = (offered, selected, spent, dense)

    def _accuracy(self, trainer: pl.Trainer) -> float | None:
        metrics = trainer.callback_metrics
        name = self.accuracy
        if name is None:
            name = next((n for n in metrics if "val" in n.lower() and "acc" in n.lower()), None)
        value = metrics.get(name) if name is not None else None
        if value is None or not math.isfinite(float(torch.as_tensor(value))):
            return None
        return float(value)


def _totals(trainer: pl.Trainer) -> tuple[int, int, float, float]:
    """Offered, selected, FLOPs spent, FLOPs of a dense run, since the start; zeros in a run without selection."""
    selection = next((c for c in trainer.callbacks if isinstance(c, SparseSelectionCallback)), None)  # type: ignore[attr-defined]
    if selection is None:
        return 0, 0, 0.0, 0.0
    ledger = selection.ledger
    return ledger.offered, ledger.selected, ledger.spent_flops() or 0.0, ledger.dense_flops() or 0.0
