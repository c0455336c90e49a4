"""The length of a pruned run: how many batches each epoch has, and how many optimizer steps that makes."""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

import lightning.pytorch as pl

from lightning_ast.core.plan_rules import even_count, planned_count
from lightning_ast.lightning_internals.class_patch import change_class
from lightning_ast.lightning_internals.fit_loop import run_length
from lightning_ast.mode_facts import PruneSteps
from lightning_ast.pruning.loader import LoaderFacts
from lightning_ast.schedule import STAGE_CODES, RunLength, Schedule, Stage
from lightning_ast.words import counted

__all__ = [
    "EpochLengths",
    "PlannedRun",
    "length_faults",
    "planned_run",
    "promise_steps",
    "pruned_lengths",
    "rounded_stages",
    "size_faults",
]


@dataclass(frozen=True)
class EpochLengths:
    """Length of an epoch in one process."""

    samples: int
    batches: int  # that are trained on: a limit of the run may leave some out
    batch_size: int | None = None  # None spreads the samples evenly over the batches, which differ by one at most
    drop_last: bool = False
    sizes: tuple[int, ...] | None = None  # of the batches, where a batch sampler decides

    @classmethod
    def of_batches(cls, sizes: list[int]) -> EpochLengths:
        """Make the length of an epoch whose batches have these numbers of samples."""
        return cls(sum(sizes), len(sizes), sizes=tuple(sizes))

    @functools.cached_property
    def starts(self) -> list[int]:
        """List where each batch that can be loaded begins among the samples of the epoch, and where the last ends."""
        if self.sizes is not None:
            return [0, *itertools.accumulate(self.sizes)]
        if self.batch_size is None:  # whole numbers throughout: every process must cut at the same places
            return [batch * self.samples // max(1, self.batches) for batch in range(self.batches + 1)]
        whole = list(range(0, self.samples + 1, self.batch_size))
        return whole if self.drop_last or whole[-1] == self.samples else [*whole, self.samples]


@dataclass(frozen=True)
class PlannedRun:
    """The stages and lengths of the epochs of a pruned run. An epoch has the stage of its middle."""

    schedule: Schedule
    dense: EpochLengths
    pruned: EpochLengths  # that of a dense epoch where each sparse one has its own
    dense_run: RunLength  # the same run without pruning; the batches to an optimizer step are known
    prunes: bool = True
    # Schedules count the steps of a dense run, of which each step of a pruned epoch stands for several.
    follows: bool = False

    @property
    def total_epochs(self) -> int | None:
        """Count the epochs of the run (the last may be cut short by ``max_steps``); None where nothing limits it."""
        max_epochs = self.dense_run.max_epochs
        max_steps = self.dense_run.max_steps
        if max_steps is None:
            return max_epochs
        most = max_steps if max_epochs is None else min(max_epochs, max_steps)
        return bisect_left(range(most), max_steps, key=self._steps)

    @property
    def steps(self) -> float:
        """Count the optimizer steps of the run; infinitely many where nothing limits it."""
        total = self.total_epochs
        steps = math.inf if total is None else self._steps(total)
        return steps if self.dense_run.max_steps is None else min(steps, self.dense_run.max_steps)

    def stage(self, epoch: int) -> Stage:
        """Return the stage of an epoch, counted from 0; one behind the end is dense."""
        total = self.total_epochs
        return "cooldown" if total is not None and epoch >= total else self._stage(epoch, total)

    def stages_from(self, epoch: int) -> list[Stage] | None:
        """List the stages of this epoch and of all that follow it; None where nothing limits the run."""
        total = self.total_epochs
        return None if total is None else [self._stage(number, total) for number in range(epoch, total)]

    def _steps(self, total: int) -> int:
        first, end = self.sparse_range(total)
        # by stretches of epochs alike: a run may be planned for a million epochs, and this is asked often
        steps = 0
        for start, stop in itertools.pairwise([*sorted({0, first, end, *(self.dense_run.accumulate or ())}), total]):
            lengths = self.pruned if first <= start < end and not self.follows else self.dense
            steps += max(0, min(stop, total) - start) * math.ceil(lengths.batches / self.dense_run.factor(start))
        return steps

    def sparse_range(self, total: int) -> tuple[int, int]:
        """Return the first sparse epoch of a run of ``total`` epochs, and the first behind the last sparse one."""

        def code(epoch: int) -> int:
            return STAGE_CODES[self._stage(epoch, total)]

        return bisect_left(range(total), 1, key=code), bisect_left(range(total), 2, key=code)

    def _stage(self, epoch: int, total: int | None) -> Stage:
        return self.schedule.stage_at(epoch + 0.5, total, dense=self.dense_run)


def pruned_lengths(
    facts: LoaderFacts,
    rate: float,
    *,
    steps: PruneSteps,
    min_selected: int | float,
    processes: int,
    at_least: bool = False,
) -> EpochLengths:
    """Plan the length of a pruned epoch in one process; ``at_least`` rounds up, to cover what is asked for."""
    size = facts.batch_size
    offered = facts.offered * processes
    if facts.batching == "own":  # what its batches hold is known when they are drawn; until then there are as many
        return EpochLengths(max(1, round(rate * facts.offered)), facts.batches)
    if steps == "keep":
        count = even_count(
            offered, rate, batches=facts.batches, batch_size=size, processes=processes, min_selected=min_selected
        )
        return EpochLengths(count // processes, facts.batches)
    count = planned_count(
        offered,
        rate,
        batch_size=size,
        processes=processes,
        drop_last=facts.drop_last,
        min_selected=min_selected,
        at_least=at_least,
    )
    each = count // processes
    return EpochLengths(each, facts.batches_of(each), size, facts.drop_last)


def planned_run(
    trainer: pl.Trainer,
    facts: LoaderFacts,
    *,
    schedule: Schedule,
    accumulate: dict[int, int],
    rate: float | None,
    min_selected: int | float,
    processes: int,
    steps: PruneSteps = "replan",
) -> PlannedRun:
    """Plan the run that a trainer's limits and its loader make; without a rate each sparse epoch has its own length."""
    size = None if facts.batching == "own" else facts.batch_size
    dense = EpochLengths(facts.draws, facts.batches, size, facts.drop_last)
    pruned = dense
    if rate is not None and rate < 1:
        pruned = pruned_lengths(facts, rate, steps=steps, min_selected=min_selected, processes=processes)
    return PlannedRun(
        schedule=schedule,
        dense=dense,
        pruned=pruned,
        dense_run=replace(run_length(trainer), batches=facts.batches, accumulate=accumulate),
        prunes=rate is None or rate < 1,
        follows=steps == "follow",
    )


def rounded_stages(run: PlannedRun) -> str | None:
    """Tell where whole epochs make other stages than those that were asked for."""
    total = run.total_epochs
    if total is None:
        return None
    asked = run.schedule.dense_epochs(total, run.dense_run)
    first, end = run.sparse_range(total)
    if max(abs(asked[0] - first), abs(asked[1] - (total - end))) < 1e-6:
        return None
    return (
        f"mode='prune' works in whole epochs: of {total} epochs the first {first} are the warmup and the last "
        f"{total - end} the cooldown ({run.schedule.dense} would be {asked[0]:.3g} and {asked[1]:.3g})."
    )


def size_faults(then: int, now: int) -> list[str]:
    """Find what is wrong with a data set that had one length and has another."""
    if then == now:
        return []
    return [
        f"the data set had {counted(then, 'sample')} and has {now} now: mode='prune' remembers samples by their "
        "index, so the data set must stay the same."
    ]


def length_faults(run: PlannedRun, trainer: pl.Trainer, facts: LoaderFacts) -> list[str]:
    """Find what is wrong with the lengths of the run and of its epochs."""
    found = []
    total = run.total_epochs
    first, end = (0, 1) if total is None else run.sparse_range(total)
    if first == end and run.prunes:
        found.append(
            "no epoch would be pruned: mode='prune' rounds warmup and cooldown to whole epochs, which leaves none of "
            f"{total} for the sparse stage. Shorten them, or train longer."
        )
    interval = getattr(trainer, "val_check_interval", None)  # Lightning has none where it is a time
    batches = run.pruned.batches
    by_epoch = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches > 0
    is_unknown = facts.batching == "own" and run.follows
    if type(interval) is int and by_epoch and (is_unknown or batches < interval <= facts.batches):
        known = f"is more than the {counted(batches, 'batch')}"
        found.append(
            f"val_check_interval={interval} {'may be more than the batches' if is_unknown else known} of a pruned "
            "epoch, which would not be validated then: use a share (a float), or check_val_every_n_epoch=None."
        )
    return found


def promise_steps(trainer: pl.Trainer, steps: Callable[[], float]) -> Callable[[], None]:
    """Make ``trainer.estimated_stepping_batches`` the planned number of steps; return a function that undoes it."""
    # Lightning multiplies the length of the first epoch, which is wrong where epochs differ in length. The property has
    # no setter and modules read it in `configure_optimizers`: the trainer gets a class of its own until the end of the
    # run.
    own = type(trainer)

    def answer(self: pl.Trainer) -> float:
        known = steps() if self.state.fn == "fit" else math.inf
        return own.estimated_stepping_batches.fget(self) if math.isinf(known) else known  # type: ignore[attr-defined]

    return change_class(trainer, {"estimated_stepping_batches": property(answer)})
