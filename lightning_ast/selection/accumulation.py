"""Gradient accumulation: micro-batches that keep different numbers of samples train as one large batch does."""

from __future__ import annotations

import lightning.pytorch as pl
from torch.optim import Optimizer

__all__ = ["AccumulationWindow"]

_LEAST = 1e-3  # share of the user's denominator below which a micro-batch's own is not divided by


class AccumulationWindow:
    """The micro-batches of one optimizer step, and what each one's loss is divided by."""

    def __init__(self) -> None:
        self._divisors: dict[int, float] = {}
        self._position = 0
        self._open = False
        self._shared = 1.0

    @staticmethod
    def first_batch(trainer: pl.Trainer, batch_idx: int) -> int:
        """Return the index of the batch with which the window of this one begins."""
        return batch_idx - batch_idx % trainer.accumulate_grad_batches

    def start_batch(self, trainer: pl.Trainer, batch_idx: int) -> None:
        """Place a batch in the window of its optimizer step."""
        self._open = trainer.accumulate_grad_batches > 1
        self._position = batch_idx - self.first_batch(trainer, batch_idx)
        if self._position == 0:
            self._divisors.clear()

    def divisor(self, own: float, offered: float) -> float:
        """Return what the weights of a micro-batch are divided by; both numbers are those of all processes."""
        if not self._open:
            return own
        # The first micro-batch cannot know what the others keep: what is used now is put right at the optimizer step.
        # Where it has next to nothing to train on, it is the user's own denominator: gradients must not overflow.
        if not self._divisors:
            self._shared = own if own > _LEAST * offered else max(offered, 1.0)
        self._divisors[self._position] = own
        return self._shared

    def rescale(self, optimizer: Optimizer) -> None:
        """Bring the accumulated gradients to the common denominator."""
        # Lightning adds up the gradients of N micro-batches, each of them a mean: 1 / N * sum(S_m / D_m), with S_m the
        # selected, weighted losses of a micro-batch and D_m its own denominator. One large batch is sum(S_m) /
        # sum(D_m). As all were divided by one number d, the factor is M * d / sum(D_m), M being the micro-batches that
        # there were. It comes ahead of clipping, is near 1, and multiplies the whole gradient: that of a penalty on the
        # parameters too.
        if not self._divisors:
            return
        total = sum(self._divisors.values())
        factor = len(self._divisors) * self._shared / total if total > 0 else 0.0
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        self._divisors.clear()
