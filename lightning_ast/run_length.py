"""The length of a run: its limits, and how epochs and optimizer steps convert. Nothing here knows Lightning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from lightning_ast.words import counted

__all__ = ["Point", "RunLength"]

N = TypeVar("N", int, float)
_ROUNDING = 1e-9  # shares of a run are products, and 0.29 * 100 epochs are 28.999999999999996


@dataclass(frozen=True)
class Point:
    """A point of a run: where an optimizer step begins."""

    epochs: float  # done, with the share of the running one
    steps: int  # done, as trainer.global_step counts them: of every optimizer


@dataclass(frozen=True, kw_only=True)
class RunLength:
    """The limits of a run, as far as they are known; the one that is reached first ends it."""

    max_epochs: int | None = None
    max_steps: int | None = None
    batches: int | None = None  # of an epoch; the loader may even be endless
    # The batches to an optimizer step from each of these epochs on, the first of which is 0. Not known under manual
    # optimization, where the module steps when it likes, and with as many optimizers as it likes.
    accumulate: Mapping[int, int] | None = None

    @property
    def epochs(self) -> float | None:
        """Return the length of the run in epochs, or None where no limit tells."""
        by_steps = None if self.max_steps is None else self.epochs_at(self.max_steps)
        return _least(self.max_epochs, by_steps)

    @property
    def steps(self) -> int | None:
        """Return the length of the run in optimizer steps, or None where no limit tells."""
        by_epochs = None if self.max_epochs is None else self.steps_at(self.max_epochs)
        return _least(self.max_steps, by_epochs)

    def steps_at(self, epochs: float) -> int | None:
        """Count the optimizer steps of so many epochs; None where the length of an epoch is not known."""
        if self.batches is None or self.accumulate is None:
            return None
        whole = math.floor(epochs + _ROUNDING)
        starts = sorted(self.accumulate)
        steps = 0
        for start, stop in zip(starts, [*starts[1:], math.inf], strict=True):
            steps += int(max(0, min(stop, whole) - start)) * math.ceil(self.batches / self.accumulate[start])
        return steps + round((epochs - whole) * self.batches) // self.factor(whole)

    def epochs_at(self, steps: int) -> float | None:
        """Convert optimizer steps to the epochs that they make; None where the length of an epoch is not known."""
        if self.batches is None or self.accumulate is None:
            return None
        starts = sorted(self.accumulate)
        for start, stop in zip(starts, [*starts[1:], math.inf], strict=True):
            factor = self.accumulate[start]
            in_epoch = math.ceil(self.batches / factor)
            if steps < (stop - start) * in_epoch:
                break
            steps -= int(stop - start) * in_epoch
        return start + steps // in_epoch + (steps % in_epoch) * factor / self.batches

    def share_done(self, at: Point) -> float | None:
        """Return the share of the run that is done, in [0, 1], or None in a run without limits."""
        by_epochs = None if self.max_epochs is None else at.epochs / self.max_epochs
        by_steps = None if self.max_steps is None else at.steps / self.max_steps
        return max((share for share in (by_epochs, by_steps) if share is not None), default=None)

    def epochs_left(self, at: Point) -> float | None:
        """Count the epochs that are still to come, or None where no limit tells."""
        by_epochs = None if self.max_epochs is None else self.max_epochs - at.epochs
        by_steps = None
        if self.max_steps is not None and (end := self.epochs_at(self.max_steps)) is not None:
            by_steps = end - (self.epochs_at(at.steps) or 0.0)
        return _least(by_epochs, by_steps)

    def steps_left(self, at: Point) -> int | None:
        """Count the optimizer steps that are still to come, or None where no limit tells."""
        by_steps = None if self.max_steps is None else self.max_steps - at.steps
        by_epochs = None
        if self.max_epochs is not None and (end := self.steps_at(self.max_epochs)) is not None:
            by_epochs = end - (self.steps_at(at.epochs) or 0)
        return _least(by_steps, by_epochs)

    def steps_per_epoch(self, epoch: int) -> int:
        """Count the optimizer steps of one epoch, whose length must be known."""
        assert self.batches is not None
        return math.ceil(self.batches / self.factor(epoch))

    def factor(self, epoch: int) -> int:
        """Return the batches to an optimizer step in an epoch, which must be known."""
        assert self.accumulate is not None
        return self.accumulate[max(start for start in self.accumulate if start <= max(0, epoch))]

    def __str__(self) -> str:
        known = ((self.epochs, "epoch"), (self.steps, "optimizer step"))
        return " and ".join(counted(number, noun) for number, noun in known if number is not None)


def _least(one: N | None, other: N | None) -> N | None:
    return min((value for value in (one, other) if value is not None), default=None)
