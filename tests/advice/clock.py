"""A clock that stands still but for what moves it, and a module that does."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FORWARD, BACKWARD, OPTIMIZER, TRANSFER = 0.01, 0.02, 0.3, 0.1


class Clock:
    """Seconds.

    Args:
        tick: by which every look at it moves it.
    """

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


class _Timed(torch.autograd.Function):
    """Moves the clock by the samples of the forward, and by those to which a gradient comes back."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, clock: Clock) -> Tensor:
        ctx.clock = clock
        clock.now += FORWARD * len(scores)
        return scores.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.clock.now += BACKWARD * int((gradient.abs().sum(1) > 0).sum())
        return gradient, None


class _TimedSGD(torch.optim.SGD):
    clock: Clock

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.clock.now += OPTIMIZER
        return loss


class TimedNet(pl.LightningModule):
    """Each step takes known seconds of a clock that it shares with its copies."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.net = nn.Linear(64, 10)
        self.head = nn.Linear(10, 10)
        self.box = _Shared(clock)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.box.clock.now += TRANSFER
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(_Timed.apply(self.net(x.flatten(1)), self.box.clock)), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.box.clock.now += 2.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = _TimedSGD(self.parameters(), lr=0.1)
        optimizer.clock = self.box.clock
        return optimizer


class _Shared:
    """Not copied with the module."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __deepcopy__(self, memo: Any) -> _Shared:
        return self
