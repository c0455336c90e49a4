"""The length of a run, its schedule, and which stage a point of the run belongs to.

Decisions alone: nothing here knows Lightning. The callbacks read the trainer and ask.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from lightning_ast.words import counted

__all__ = ["STAGE_CODES", "Point", "RunLength", "Schedule", "Stage"]

N = TypeVar("N", int, float)
M = TypeVar("M", int, float)
Stage = Literal["warmup", "sparse", "cooldown"]
STAGE_CODES: dict[Stage, int] = {"warmup": 0, "sparse": 1, "cooldown": 2}
_ROUNDING = 1e-9  # 0.29 * 100 epochs are 28.999999999999996: no stage may end a batch late for that


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
        return self.epochs_left(Point(0, 0))

    @property
    def steps(self) -> int | None:
        """Return the length of the run in optimizer steps, or None where no limit tells."""
        return self.steps_left(Point(0, 0))

    def steps_at(self, epochs: float) -> int | None:
        """Count the optimizer steps of so many epochs; None where the length of an epoch is not known."""
        if self.batches is None or self.accumulate is None:
            return None
        whole = math.floor(epochs + _ROUNDING)
        steps = 0
        for start, stop in _stretches(self.accumulate):
            steps += int(max(0, min(stop, whole) - start)) * math.ceil(self.batches / self.accumulate[start])
        return steps + round((epochs - whole) * self.batches) // self.factor(whole)

    def epochs_at(self, steps: int) -> float | None:
        """Convert optimizer steps to the epochs that they make; None where the length of an epoch is not known."""
        if self.batches is None or self.accumulate is None:
            return None
        for start, stop in _stretches(self.accumulate):
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
        return _left(self.max_epochs, at.epochs, self.max_steps, at.steps, self.epochs_at)

    def steps_left(self, at: Point) -> int | None:
        """Count the optimizer steps that are still to come, or None where no limit tells."""
        return _left(self.max_steps, at.steps, self.max_epochs, at.epochs, self.steps_at)

    def factor(self, epoch: int) -> int:
        """Return the batches to an optimizer step in an epoch, which must be known."""
        assert self.accumulate is not None
        return self.accumulate[max(start for start in self.accumulate if start <= max(0, epoch))]

    def __str__(self) -> str:
        known = ((self.epochs, "epoch"), (self.steps, "optimizer step"))
        return " and ".join(counted(number, noun) for number, noun in known if number is not None)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warmup on all samples, the sparse stage, cooldown on all samples.

    Example:
        >>> schedule = Schedule(warmup_epochs=0.1, cooldown_steps=30)
        >>> run = RunLength(max_steps=100)  # over an endless loader
        >>> [schedule.stage(Point(0, step), run) for step in (9, 10, 69, 70)]
        ['warmup', 'sparse', 'sparse', 'cooldown']
    """

    warmup_epochs: int | float | None = None  # an int counts epochs, a float in [0, 1) is a share of the run
    cooldown_epochs: int | float | None = None  # the same at the end
    warmup_steps: int | None = None  # optimizer steps, in place of epochs
    cooldown_steps: int | None = None

    @property
    def dense(self) -> str:
        """Name the warmup and the cooldown, as they were given."""
        names = ("warmup_steps", "warmup_epochs", "cooldown_steps", "cooldown_epochs")
        given = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name)]
        return " and ".join(given)

    def stage(self, at: Point, run: RunLength) -> Stage:
        """Return the stage of the optimizer step that begins at a point of the run; warmup wins over cooldown."""
        if self._warms_up(at, run):
            return "warmup"
        return "cooldown" if self._cools_down(at, run) else "sparse"

    def stage_at(self, epochs: float, total_epochs: float | None, *, dense: RunLength | None = None) -> Stage:
        """Return the stage at a point that is known in epochs alone; stages in steps need the length of a dense epoch.

        Example:
            >>> schedule = Schedule(warmup_epochs=2, cooldown_epochs=0.1)
            >>> [schedule.stage_at(epochs, 10) for epochs in (1.99, 2.0, 9.0)]
            ['warmup', 'sparse', 'cooldown']
        """
        warmup, cooldown = self.dense_epochs(total_epochs, dense)
        if epochs + _ROUNDING < warmup:
            return "warmup"
        if total_epochs is not None and cooldown and epochs + _ROUNDING >= total_epochs - cooldown:
            return "cooldown"
        return "sparse"

    def dense_epochs(self, total_epochs: float | None, dense: RunLength | None = None) -> tuple[float, float]:
        """Convert warmup and cooldown to epochs; those in steps need the length of a dense epoch.

        A share of an open-ended run is infinite.
        """
        warmup, cooldown = (_in_epochs(part, total_epochs) for part in (self.warmup_epochs, self.cooldown_epochs))
        if (self.warmup_steps or self.cooldown_steps) and (dense is None or dense.batches is None):
            raise ValueError("stages in optimizer steps are not known in epochs: ask for the stage of a batch.")
        if dense is not None and self.warmup_steps:
            warmup = dense.epochs_at(self.warmup_steps) or 0.0
        if dense is not None and dense.batches is not None and self.cooldown_steps and total_epochs is not None:
            cooldown = self.cooldown_steps / math.ceil(dense.batches / dense.factor(math.ceil(total_epochs) - 1))
        return warmup, cooldown

    def _warms_up(self, at: Point, run: RunLength) -> bool:
        if self.warmup_steps is not None:
            return at.steps < self.warmup_steps
        if isinstance(self.warmup_epochs, float):
            return (run.share_done(at) or 0.0) + _ROUNDING < self.warmup_epochs
        return at.epochs + _ROUNDING < (self.warmup_epochs or 0)

    def _cools_down(self, at: Point, run: RunLength) -> bool:
        length = self.cooldown_epochs if self.cooldown_steps is None else self.cooldown_steps
        if not length:
            return False
        left: float | None
        if self.cooldown_steps is not None:
            left = run.steps_left(at)
        elif isinstance(length, float):
            done = run.share_done(at)
            left = None if done is None else 1 - done
        else:
            left = run.epochs_left(at)
        return left is not None and left <= length + _ROUNDING

    def setting_faults(self) -> list[str]:
        """Find what is wrong with the settings on their own."""
        found = []
        for stage in ("warmup", "cooldown"):
            epochs = getattr(self, f"{stage}_epochs")
            steps = getattr(self, f"{stage}_steps")
            if epochs is not None and steps is not None:
                found.append(f"{stage}_epochs={epochs!r} and {stage}_steps={steps!r}: expected one, got both.")
            is_share = isinstance(epochs, float) and 0 <= epochs < 1
            if epochs is not None and not is_share and not _is_count(epochs):
                found.append(f"{stage}_epochs: expected an int >= 0 or a float in [0, 1), got {epochs!r}.")
            if steps is not None and not _is_count(steps):
                found.append(f"{stage}_steps: expected an int >= 0 (optimizer steps), got {steps!r}.")
        return found

    def length_faults(self, run: RunLength, *, batches_known: bool, whole_epochs: bool = False) -> list[str]:
        """Find what is wrong with the schedule in this run, as far as it can be known.

        Where the loader has been looked at, ``batches=None`` means that it has no length. Mode ``prune`` rounds the
        stages to whole epochs.
        """
        fault = self._end_fault(run, no_length=batches_known and run.batches is None, whole_epochs=whole_epochs)
        if fault is None and self.never_sparse(run):
            fault = f"{self.dense} would leave no sparse step in a run of {run}: shorten them, or train longer."
        return [] if fault is None else [fault]

    def never_sparse(self, run: RunLength) -> bool:
        """Tell whether it is certain that the run has no sparse step."""
        if run.steps is not None and run.batches is not None and run.accumulate is not None:
            return self._all_dense(run.steps, run)
        ends_by_epochs = isinstance(self.warmup_epochs, int) and self.warmup_epochs > 0
        by_steps = RunLength(max_steps=run.max_steps)
        if run.max_steps is not None and not ends_by_epochs and self._all_dense(run.max_steps, by_steps):
            return True
        parts = (self.warmup_epochs, self.cooldown_epochs)
        return run.max_epochs is not None and (
            sum(_in_epochs(part, run.max_epochs) for part in parts) + _ROUNDING >= run.max_epochs
        )

    def _all_dense(self, steps: int, run: RunLength) -> bool:
        """Tell whether no step is sparse; the stages follow one another, so that few steps need a look."""

        def code(step: int) -> int:
            return STAGE_CODES[self.stage(Point(run.epochs_at(step) or 0.0, step), run)]

        first = bisect_left(range(steps), STAGE_CODES["sparse"], key=code)
        return first == steps or code(first) != STAGE_CODES["sparse"]

    def _end_fault(self, run: RunLength, *, no_length: bool, whole_epochs: bool) -> str | None:
        """Find settings that depend on the end of the run, where the end is not known."""
        has_share = _is_share(self.warmup_epochs) or _is_share(self.cooldown_epochs)
        whole_cooldown = bool(self.cooldown_epochs) and not _is_share(self.cooldown_epochs)
        needs_end = has_share or whole_cooldown or bool(self.cooldown_steps)
        manual = run.accumulate is None  # then max_steps counts every optimizer's steps
        by_steps = run.max_steps is not None
        by_epochs = run.max_epochs is not None
        possible = (
            (
                whole_epochs and manual and bool(self.warmup_steps or self.cooldown_steps or (by_steps and needs_end)),
                "mode='prune' works in whole epochs, and how many steps manual optimization makes in one is not known: "
                "give epochs, and set Trainer(max_epochs=...) instead of max_steps.",
            ),
            (
                needs_end and not by_steps and not by_epochs,
                "a cooldown or a share of the run needs a run of known length: set Trainer(max_epochs=...) or "
                "Trainer(max_steps=...) (max_time does not tell how many steps there will be).",
            ),
            (
                whole_cooldown and ((by_steps and manual) or (no_length and not by_epochs)),
                "the end of the run is not known in epochs, with manual optimization and max_steps, or with a "
                "dataloader without a length: give a share of the run, or cooldown_steps.",
            ),
            (
                not by_steps and ((has_share and no_length) or (bool(self.cooldown_steps) and (manual or no_length))),
                "the optimizer steps of the run are not known, with a dataloader without a length or manual "
                "optimization: set Trainer(max_steps=...), or give whole epochs.",
            ),
        )
        fault = next((fault for is_wrong, fault in possible if is_wrong), None)
        return None if fault is None else f"{self.dense}: {fault}"


def _in_epochs(part: int | float | None, total_epochs: float | None) -> float:
    if not isinstance(part, float):
        return part or 0.0
    return part * (math.inf if total_epochs is None else total_epochs) if part else 0.0


def _is_share(part: int | float | None) -> bool:
    return isinstance(part, float) and part > 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _stretches(accumulate: Mapping[int, int]) -> list[tuple[int, float]]:
    """List the stretches of epochs that accumulate alike: the first epoch of each, and the first behind it."""
    starts = sorted(accumulate)
    return list(zip(starts, [*starts[1:], math.inf], strict=True))


def _left(limit: N | None, done: N, other: M | None, other_done: M, convert: Callable[[M], N | None]) -> N | None:
    """Count what is left until the nearer of two limits, in the unit of the first, to which the other is converted."""
    left = [] if limit is None else [limit - done]
    if other is not None and (end := convert(other)) is not None:
        left.append(end - (convert(other_done) or 0))
    return min(left, default=None)
