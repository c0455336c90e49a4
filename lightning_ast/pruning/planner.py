"""How long an epoch of mode ``prune`` is, and which samples it loads: decided by what is remembered of each sample."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_ast.core.gate import NEARLY_ALL, floor_for, rate_at_coverage
from lightning_ast.core.history import EpochPlan, SignificanceHistory, plan_epoch
from lightning_ast.core.many import MANY, rate_of_many
from lightning_ast.core.selector import SampleSelector
from lightning_ast.lightning_internals.distributed import Processes
from lightning_ast.lightning_internals.run_limits import accumulation
from lightning_ast.mode_facts import PruneSteps
from lightning_ast.pruning.epoch import RunningEpoch
from lightning_ast.pruning.loader import LoaderFacts
from lightning_ast.pruning.run_plan import EpochLengths, PlannedRun, planned_run, pruned_lengths
from lightning_ast.schedule import Schedule
from lightning_ast.words import counted

__all__ = ["EpochPlanner"]

_EXCESS = 0.1  # the share by which more samples than the target needs may be loaded without a warning


class EpochPlanner:
    """Plans epochs from the remembered significance; every process plans the same."""

    def __init__(
        self, trainer: pl.Trainer, selector: SampleSelector, schedule: Schedule, processes: Processes, steps: PruneSteps
    ) -> None:
        self._trainer = trainer
        self._selector = selector
        self._schedule = schedule
        self._processes = processes
        self._steps: PruneSteps = steps
        self._accumulate = accumulation(trainer)  # once: a scheduler callback changes the trainer's own in the run
        self.history: SignificanceHistory | None = None
        self.facts: LoaderFacts | None = None
        self._has_warned = False

    @property
    def run(self) -> PlannedRun:
        """Return the run that the trainer's limits make."""
        # Made anew each time: callbacks and scripts raise max_epochs between two fits, or within one.
        assert self.facts is not None
        return planned_run(
            self._trainer,
            self.facts,
            schedule=self._schedule,
            accumulate=self._accumulate,
            rate=self._selector.target_activation_rate if self._selector.selects else 1.0,
            min_selected=self._selector.min_selected,
            processes=self._processes.count,
            steps=self._steps,
        )

    def fold(self) -> SignificanceHistory:
        """Take what all processes observed since the last time into what is remembered, and return it."""
        assert self.history is not None
        self.history.fold(self._processes.maximum if self._processes.count > 1 else None)
        return self.history

    def sparse_lengths(self) -> EpochLengths | None:
        """Plan the length of a sparse epoch; None where it is loaded whole."""
        if not self._selector.selects:
            return None
        if self._selector.target_coverage is None:
            assert self._selector.target_activation_rate is not None
            return self._lengths_at(self._selector.target_activation_rate)
        history = self.fold()
        if not history.seen.any():  # as long as nothing is known of any sample, one is as good as another
            return None
        # Samples that the sampler never offers do not count: they would look like the most significant.
        lengths = self._lengths_at(self._rate_to_cover(history, history.seen))
        assert self.facts is not None
        return None if lengths.samples >= NEARLY_ALL * self.facts.offered else lengths

    def plan(self, epoch: RunningEpoch, draws: Tensor) -> EpochPlan:
        """Choose the samples of an epoch from the ``(n,)`` dataset indices that all processes drew, in turn."""
        # Where the rate depends on what is offered, the length is made right here.
        assert self.facts is not None
        history = self.fold()
        processes = self._processes.count
        if not epoch.sparse:
            return EpochPlan(epoch.number, draws, self.facts.offered * processes)
        offered = draws[: self.facts.offered * processes]
        if self._selector.target_coverage is not None and self._steps == "keep":
            # Other samples may be offered than each one once: as many batches, of those that cover what is offered.
            epoch.lengths = self._lengths_at(self._rate_to_cover(history, offered))
        count = epoch.lengths.samples * processes
        return plan_epoch(history, offered, epoch=epoch.number, count=count, selector=self._selector)

    def split(self, *, sparse: bool) -> dict[str, Any] | None:
        """Return the settings that decide how a plan is dealt out and weighted; None before they are known."""
        if self.facts is None:
            return None
        return {
            "batch_size": self.facts.batch_size,
            "drop_last": int(self.facts.drop_last),
            "processes": self._processes.count,
            "weighting": self._selector.weighting if sparse else None,
        }

    def _rate_to_cover(self, history: SignificanceHistory, samples: Tensor) -> float:
        """Return the rate at which the coverage is met among some samples, a mask or dataset indices."""
        coverage = self._selector.target
        significance = history.significance(trim=self._selector.trim)[samples]
        # A hard cut over a whole data set keeps the largest scores, as topk does.
        gate = self._selector.gate if self._selector.gate == "soft" else "topk"
        solve = rate_of_many if significance.numel() > MANY else rate_at_coverage
        return solve(significance, coverage, gate, floor=floor_for(coverage))

    def _lengths_at(self, rate: float) -> EpochLengths:
        assert self.facts is not None
        processes = self._processes.count
        lengths = pruned_lengths(
            self.facts,
            rate,
            steps=self._steps,
            min_selected=self._selector.min_selected,
            processes=processes,
            at_least=self._selector.target_coverage is not None,
        )
        if (
            self._steps == "keep"
            and not self._has_warned
            and lengths.samples > (1 + _EXCESS) * rate * self.facts.offered
        ):
            self._has_warned = True
            rank_zero_warn(
                f"lightning-ast: prune_steps='keep' leaves {counted(lengths.samples // lengths.batches, 'sample')} in "
                f"each batch of {self.facts.batch_size}, or what min_selected asks for: {lengths.samples} samples are "
                f"loaded where the target needs {round(rate * self.facts.offered)}. Use larger batches, or "
                "prune_steps='follow'."
            )
        return lengths
