"""Gradient accumulation: micro-batches that keep different numbers of samples train as one large batch does."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["AccumulationWindow"]


class AccumulationWindow:
    """The micro-batches of one optimizer step, and what each one's loss is divided by.

    Lightning adds up the gradients of N micro-batches, each of them a mean: ``1 / N * sum(S_m / D_m)``, with S_m the
    selected, weighted losses of a micro-batch and D_m its own denominator. One large batch is ``sum(S_m) / sum(D_m)``.
    So all micro-batches are divided by the first one's denominator, and the gradients are multiplied by
    ``M * D_1 / sum(D_m)`` ahead of clipping, M being the micro-batches that there were. What a training step adds to
    the captured loss (a penalty) is multiplied by the same factor, which is near 1.
    """

    def __init__(self) -> None:
        self._divisors: dict[int, Tensor] = {}
        self._position = 0
        self._open = False

    @staticmethod
    def first_batch(trainer: pl.Trainer, batch_idx: int) -> int:
        """Index of the batch with which the window of this one begins."""
        return batch_idx - batch_idx % trainer.accumulate_grad_batches

    def start_batch(self, trainer: pl.Trainer, batch_idx: int) -> None:
        """A batch is going to be trained on."""
        self._open = trainer.accumulate_grad_batches > 1
        self._position = batch_idx - self.first_batch(trainer, batch_idx)
        if self._position == 0:
            self._divisors.clear()

    def divisor(self, own: Tensor) -> Tensor:
        """What a sparse micro-batch's loss is divided by.

        Args:
            own: scalar, its own denominator over all processes.
        """
        if not self._open:
            return own
        self._divisors[self._position] = own
        return next(iter(self._divisors.values()))

    def rescale(self, optimizer: Optimizer) -> None:
        """Bring the accumulated gradients to the common denominator; no device is waited for."""
        if len(self._divisors) < 2:
            return
        first, *others = self._divisors.values()
        factor = len(self._divisors) * first / sum(others, first)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor.to(parameter.grad.device))
        self._divisors.clear()
