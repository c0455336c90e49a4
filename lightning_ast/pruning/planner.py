"""How long an epoch of mode ``prune`` is, and which samples it loads: decided by what is remembered of each sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor

from lightning_ast.core.gate import NEARLY_ALL
from lightning_ast.core.history import EpochPlan, SignificanceHistory, plan_epoch
from lightning_ast.core.plan_rules import common_rate, even_count, rate_to_cover
from lightning_ast.core.selector import SampleSelector
from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.fit_loop import accumulation, loaders
from lightning_ast.mode_facts import PruneSteps
from lightning_ast.pruning.epoch import RunningEpoch
from lightning_ast.pruning.loader import LoaderFacts, draw
from lightning_ast.pruning.own_batches import DrawnBatches, plan_batches, sample_groups
from lightning_ast.pruning.own_parts import DataParts
from lightning_ast.pruning.run_plan import EpochLengths, PlannedRun, planned_run, pruned_lengths, size_faults
from lightning_ast.pruning.sample_book import SampleSettings, make_history
from lightning_ast.schedule import Schedule
from lightning_ast.words import counted

__all__ = ["EpochPlanner"]

_EXCESS = 0.1  # the share by which more samples than the target needs may be loaded without a warning


class EpochPlanner:
    """Plans epochs from the remembered significance; every process plans the same."""

    facts: LoaderFacts  # the lengths of an epoch, which all processes keep
    _own: LoaderFacts  # those of this process's loader, which has more where its part is larger

    def __init__(
        self,
        trainer: pl.Trainer,
        selector: SampleSelector,
        schedule: Schedule,
        parts: DataParts,
        steps: PruneSteps,
        *,
        samples: SampleSettings,
        begin_target: Callable[[int], None] | None = None,
    ) -> None:
        self._trainer = trainer
        self._selector = selector
        self._schedule = schedule
        self.parts = parts
        self._processes = parts.sharing
        self.steps: PruneSteps = steps
        self.samples = samples
        self.begin_target = begin_target  # asks for the target of an epoch, where it is not the same in all
        self._accumulate = accumulation(trainer)  # once: a scheduler callback changes the trainer's own in the run
        self.history: SignificanceHistory | None = None
        self.knows_loader = False  # there are facts of it
        self.filters = False  # a stream, in which a filter stands
        self._has_warned = False

    @property
    def run(self) -> PlannedRun:
        """Return the run that the trainer's limits make."""
        # Made anew each time: callbacks and scripts raise max_epochs between two fits, or within one.
        rate: float | None = 1.0
        if self.begin_target is not None:
            rate = None
        elif self._selector.selects:
            rate = self._selector.target_activation_rate
        return planned_run(
            self._trainer,
            self.facts,
            schedule=self._schedule,
            accumulate=self._accumulate,
            rate=rate,
            min_selected=self._selector.min_selected,
            processes=self._processes.count,
            steps=self.steps,
        )

    @property
    def draws_batches(self) -> bool:
        """Tell whether a batch sampler of the user's own makes the batches."""
        return self.facts.batching == "own"

    def count_anew(self, given: CombinedLoader) -> bool:
        """Read the length of the user's own batch sampler, which may change between epochs; tell whether it has."""
        before = self.facts
        if self.draws_batches:
            self.take(LoaderFacts.of(given))
        return self.facts != before

    def take(self, facts: LoaderFacts) -> None:
        """Plan from now on for a loader of these lengths."""
        self._own = facts
        self.facts = self.parts.agree(facts)
        self.knows_loader = True

    def begin_history(self, state: dict[str, Any] | None, *, resumes: bool) -> None:
        """Remember nothing of the samples but what a state holds; one of another data set is an error in a resume."""
        first = self._processes.rank == 0
        size = self.facts.dataset_size
        self.history = make_history(self.samples, size, state or {}, must_fit=resumes, first=first)

    def unknown_faults(self) -> list[str]:
        """Find that the one sparse epoch of the run will be loaded whole, because nothing is known of any sample."""
        total = self.run.total_epochs
        is_only = total is not None and self.run.sparse_range(total) == (0, 1)
        knows = self.history is None or bool(self.history.seen.any())
        if self._selector.target_coverage is None or not is_only or knows or self._trainer.fast_dev_run:  # type: ignore[attr-defined]
            return []
        return [
            "no epoch would be pruned: with target_coverage an epoch is loaded whole as long as nothing is known of "
            "its samples, and this run has no other epoch to prune. Train longer, or give initial_scores or a "
            "target_activation_rate."
        ]

    def fold(self) -> SignificanceHistory:
        """Take what all processes observed since the last time into what is remembered, and return it."""
        assert self.history is not None
        self.history.fold(self._processes.maximum)
        return self.history

    def sparse_lengths(self) -> EpochLengths | None:
        """Plan the length of a sparse epoch; None where it is loaded whole."""
        if not self._selector.selects:
            return None
        if self._selector.target_coverage is None:
            assert self._selector.target_activation_rate is not None
            return self._lengths_at(self._selector.target_activation_rate)
        history = self.fold()
        # As long as nothing is known of any sample, one is as good as another.
        if not self.parts.any(bool(history.seen.any())):
            return None
        # Samples that the sampler never offers do not count: they would look like the most significant.
        lengths = self._lengths_at(self._rate_to_cover(history, history.seen))
        return None if lengths.samples >= NEARLY_ALL * self.facts.offered else lengths

    def draw(
        self, epoch: RunningEpoch, sampler: Any, generators: list[Any], *, started: Iterator[Any] | None = None
    ) -> EpochPlan:
        """Draw from the user's sampler in every process, and plan the epoch from all that was drawn."""
        assert self.history is not None
        for loader in loaders(self._trainer.fit_loop):
            if faults := size_faults(len(self.history), len(loader.dataset)):
                raise ConfigurationError(faults)
        # Every process draws its own part as it would without pruning, and all plan from the parts put together: the
        # plan is then the same in all, whatever the sampler does.
        facts = self.facts if self.draws_batches else self._own
        own, sizes, epoch.drained = draw(sampler, facts, generators, started=started)
        if self.draws_batches:
            groups = sample_groups(sampler, facts.dataset_size)
            return self._plan_batches(epoch, DrawnBatches.joined(self._processes.gathered((own, sizes))), groups)
        if len(self.history) < 2**31:  # half as much to exchange
            own = own.int()
        return self.plan(epoch, self._processes.interleaved(own).long())

    def plan(self, epoch: RunningEpoch, draws: Tensor) -> EpochPlan:
        """Choose the samples of an epoch from the ``(n,)`` dataset indices that all processes drew, in turn."""
        # Where the rate depends on what is offered, the length is made right here.
        history = self.fold()
        processes = self._processes.count
        if not epoch.sparse:
            return EpochPlan(epoch.number, draws[: self.facts.draws * processes], self.facts.offered * processes)
        # What drop_last leaves out of a stream is the end of its own order, not that of the numbers.
        offered = draws if self.filters else draws[: self._own.offered * processes]
        if self._selector.target_coverage is not None and self.steps == "keep":
            # Other samples may be offered than each one once: as many batches, of those that cover what is offered.
            epoch.lengths = self._lengths_at(self._rate_to_cover(history, offered))
        count = epoch.lengths.samples * processes
        _check_certain(history, offered, count)
        return plan_epoch(history, offered, epoch=epoch.number, count=count, selector=self._selector)

    @property
    def counts_alike(self) -> bool:
        """Tell whether an epoch's number of samples is known beforehand, and no sample has a weight."""
        weighs = self._selector.selects and self._selector.weighting != "none"
        return self._selector.target_coverage is None and not weighs

    def plan_part(self, epoch: RunningEpoch, offered: Tensor, samples: range, *, count: int) -> EpochPlan:
        """Choose the samples of one of several loaders, whose own are ``samples`` of all that are remembered."""
        history = self.fold()
        if not epoch.sparse:
            return EpochPlan(epoch.number, offered, offered.numel())
        own = history.part(samples)
        return plan_epoch(own, offered, epoch=epoch.number, count=count, selector=self._selector)

    def _plan_batches(self, epoch: RunningEpoch, drawn: DrawnBatches, groups: Tensor | None) -> EpochPlan:
        history = self.fold()
        offered = drawn.indices.numel()
        if not epoch.sparse:
            epoch.sizes = drawn.sizes
            plan = EpochPlan(epoch.number, drawn.indices, offered)
        else:
            rate = self._selector.target
            if self._selector.target_coverage is not None:
                rate = self._rate_to_cover(history, drawn.indices)
            batches = drawn.sizes.numel()
            size = round(offered / batches)
            floor = size if self.steps == "keep" else 0
            least = self._selector.min_selected
            count = even_count(offered, rate, batches=batches, batch_size=floor, min_selected=least)
            _check_certain(history, drawn.indices, count)
            plan, epoch.sizes = plan_batches(
                history,
                drawn,
                groups,
                epoch=epoch.number,
                count=count,
                selector=self._selector,
                refills=self.steps == "follow",
                most=self.parts.most,
            )
            self._warn_of_excess(plan.indices.numel(), rate * offered, epoch.sizes.numel(), size)
        epoch.lengths = EpochLengths.of_batches(epoch.sizes[self._processes.rank].tolist())
        return plan

    def split(self, *, sparse: bool) -> dict[str, Any] | None:
        """Return the settings that decide how a plan is dealt out and weighted; None before they are known."""
        if not self.knows_loader:
            return None
        return {
            "batch_size": self.facts.batch_size,
            "drop_last": int(self.facts.drop_last),
            "processes": self.parts.everyone.count,
            "own_parts": self.parts.count,
            "weighting": self._selector.weighting if sparse else None,
            "sample_filter": int(self.filters),
        }

    def _rate_to_cover(self, history: SignificanceHistory, samples: Tensor) -> float:
        """Return the rate at which the coverage is met among some samples, a mask or dataset indices."""
        always = history.rules.always_among(samples)
        significance = history.significance(trim=self._selector.trim)[samples]
        target = self._selector.target
        if self.parts.are_own:
            share = self.facts.offered / self._own.offered
            total = self.parts.owners.total
            rate = common_rate(significance, target, self._selector.gate, total=total, share=share, always=always)
        else:
            rate = rate_to_cover(significance, target, self._selector.gate, always=always)
        return max(rate, history.rules.class_floor)

    def _lengths_at(self, rate: float) -> EpochLengths:
        lengths = pruned_lengths(
            self.facts,
            rate,
            steps=self.steps,
            min_selected=self._selector.min_selected,
            processes=self._processes.count,
            at_least=self._selector.target_coverage is not None,
        )
        if self.steps == "keep" and not self.draws_batches:
            wanted = rate * self.facts.offered
            self._warn_of_excess(lengths.samples, wanted, lengths.batches, self.facts.batch_size)
        return lengths

    def _warn_of_excess(self, loaded: int, wanted: float, batches: int, size: int) -> None:
        """Warn, once, where batches that must not become too small load more than the target needs."""
        if self._has_warned or loaded <= max((1 + _EXCESS) * wanted, math.ceil(wanted)):
            return
        self._has_warned = True
        names = "a batch sampler that names its group_ids and " if self.draws_batches else ""
        which = "all there are" if loaded == self.facts.offered else f"{loaded} samples"
        rank_zero_warn(
            f"lightning-ast: prune_steps={self.steps!r} leaves {counted(loaded // batches, 'sample')} in "
            f"each batch of {size}, or what min_selected asks for: {which} are "
            f"loaded where the target needs {round(wanted)}. Use larger batches, or {names}prune_steps='follow'."
        )


def _check_certain(history: SignificanceHistory, offered: Tensor, count: int) -> None:
    """Refuse a plan that cannot hold all samples that it must hold."""
    if history.rules.always is None:
        return
    certain = int((history.rules.always & ~history.withheld)[offered].sum())
    if certain > count:
        raise ConfigurationError(
            f"always: {counted(certain, 'sample')} of the epoch must be trained on, and at this target it loads "
            f"{count}: raise the target, or name fewer samples."
        )
