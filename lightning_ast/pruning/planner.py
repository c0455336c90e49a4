"""How long an epoch of mode ``prune`` is, and which samples it loads: decided by what is remembered of each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor

from lightning_ast.core.epoch_counts import even_count
from lightning_ast.core.gate import NEARLY_ALL
from lightning_ast.core.history import EpochPlan, SignificanceHistory, plan_epoch
from lightning_ast.core.plan_rules import common_rate, rate_to_cover
from lightning_ast.core.selector import SampleSelector
from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.distributed import Processes
from lightning_ast.lightning_internals.fit_loop import loaders
from lightning_ast.lightning_internals.run_limits import accumulation
from lightning_ast.mode_facts import PruneSteps
from lightning_ast.pruning.epoch import RunningEpoch
from lightning_ast.pruning.loader import LoaderFacts, draw, source_of
from lightning_ast.pruning.own_batches import DrawnBatches, draw_batches, plan_batches, sample_groups
from lightning_ast.pruning.own_parts import OwnParts
from lightning_ast.pruning.run_plan import EpochLengths, PlannedRun, planned_run, pruned_lengths, size_faults
from lightning_ast.pruning.sample_book import SampleBook
from lightning_ast.schedule import Schedule
from lightning_ast.words import counted

__all__ = ["EpochPlanner"]

_EXCESS = 0.1  # the share by which more samples than the target needs may be loaded without a warning


class EpochPlanner:
    """Plans epochs from the remembered significance; every process plans the same."""

    def __init__(
        self,
        trainer: pl.Trainer,
        selector: SampleSelector,
        schedule: Schedule,
        processes: Processes,
        steps: PruneSteps,
        *,
        samples: SampleBook,
        own_parts: OwnParts | None = None,
        begin_target: Callable[[int], None] | None = None,
    ) -> None:
        self._trainer = trainer
        self._selector = selector
        self._schedule = schedule
        self._processes = processes
        self._steps: PruneSteps = steps
        self.samples = samples
        self._own_parts = own_parts
        self._begin_target = begin_target
        self._accumulate = accumulation(trainer)  # once: a scheduler callback changes the trainer's own in the run
        self.history: SignificanceHistory | None = None
        self.facts: LoaderFacts | None = None  # the lengths of an epoch, which all processes keep
        self._own: LoaderFacts | None = None  # those of this process's loader, which has more where its part is larger
        self.filters = False  # a stream, in which a filter stands
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
            rate=self._rate_of_all_epochs(),
            min_selected=self._selector.min_selected,
            processes=self._processes.count,
            steps=self._steps,
        )

    @property
    def draws_batches(self) -> bool:
        """Tell whether a batch sampler of the user's own makes the batches."""
        return self.facts is not None and self.facts.batching == "own"

    def count_anew(self, given: CombinedLoader | None) -> bool:
        """Read the length of the user's own batch sampler, which may change between epochs; tell whether it has."""
        before = self.facts
        if given is None or not self.draws_batches:
            return False
        self.take(LoaderFacts.of(given))
        return self.facts != before

    def take(self, facts: LoaderFacts) -> None:
        """Plan from now on for a loader of these lengths."""
        self._own = facts
        self.facts = facts if self._own_parts is None else self._own_parts.agree(facts)

    def begin_target(self, epoch: int) -> None:
        """Ask for the target of an epoch, where it is not the same in all."""
        if self._begin_target is not None:
            self._begin_target(epoch)

    def begin_history(self, state: dict[str, Any] | None, *, resumes: bool) -> None:
        """Remember nothing of the samples but what a state holds; one of another data set is an error in a resume."""
        assert self.facts is not None
        self.history = self.samples.make_history(self.facts.dataset_size, state or {}, must_fit=resumes)

    def _rate_of_all_epochs(self) -> float | None:
        if self._begin_target is not None:
            return None
        return self._selector.target_activation_rate if self._selector.selects else 1.0

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
        seen_any = bool(history.seen.any())
        if self._own_parts is not None:
            seen_any = self._own_parts.any(seen_any)
        if not seen_any:  # as long as nothing is known of any sample, one is as good as another
            return None
        # Samples that the sampler never offers do not count: they would look like the most significant.
        lengths = self._lengths_at(self._rate_to_cover(history, history.seen))
        assert self.facts is not None
        return None if lengths.samples >= NEARLY_ALL * self.facts.offered else lengths

    def draw(
        self,
        epoch: RunningEpoch,
        sampler: Any,
        generators: list[Any],
        *,
        started: Iterator[Any] | None = None,
    ) -> EpochPlan:
        """Draw from the user's sampler in every process, and plan the epoch from all that was drawn."""
        assert self.history is not None
        assert self.facts is not None
        for loader in loaders(self._trainer.fit_loop):
            if faults := size_faults(len(self.history), len(loader.dataset)):
                raise ConfigurationError(faults)
        # Every process draws its own part as it would without pruning, and all plan from the parts put together: the
        # plan is then the same in all, whatever the sampler does.
        if self.facts.batching == "own":
            part, epoch.drained = draw_batches(sampler, self.facts, generators, started=started)
            groups = sample_groups(sampler, self.facts.dataset_size)
            return self.plan_batches(epoch, DrawnBatches.joined(self._processes.gathered(part)), groups)
        assert self._own is not None
        own, epoch.drained = draw(sampler, self._own, generators, started=started)
        if len(self.history) < 2**31:  # half as much to exchange
            own = own.int()
        return self.plan(epoch, self._processes.interleaved(own).long())

    def draw_ahead(self, epoch: RunningEpoch, generators: list[Any], *, anew: bool) -> bool:
        """Draw and plan an epoch before its loader starts where nothing else tells its length; tell whether it was.

        With ``anew`` it is drawn once more where it has a plan.
        """
        is_needed = self.draws_batches and self._steps == "follow" and epoch.sparse
        if not is_needed or (epoch.plan is not None and not anew):
            return False
        (loader,) = loaders(self._trainer.fit_loop)
        sampler = source_of(loader)
        if callable(set_epoch := getattr(sampler, "set_epoch", None)):
            # Lightning leaves it to the user's own hook, on_train_epoch_start, which comes later.
            set_epoch(epoch.number)
        epoch.plan = self.draw(epoch, sampler, generators)
        epoch.replays = True
        return True

    def plan(self, epoch: RunningEpoch, draws: Tensor) -> EpochPlan:
        """Choose the samples of an epoch from the ``(n,)`` dataset indices that all processes drew, in turn."""
        # Where the rate depends on what is offered, the length is made right here.
        assert self.facts is not None
        assert self._own is not None
        history = self.fold()
        processes = self._processes.count
        if not epoch.sparse:
            return EpochPlan(epoch.number, draws[: self.facts.draws * processes], self.facts.offered * processes)
        offered = draws[: self._own.offered * processes]
        if self._selector.target_coverage is not None and self._steps == "keep":
            # Other samples may be offered than each one once: as many batches, of those that cover what is offered.
            epoch.lengths = self._lengths_at(self._rate_to_cover(history, offered))
        count = epoch.lengths.samples * processes
        _check_certain(history, offered, count)
        return plan_epoch(history, offered, epoch=epoch.number, count=count, selector=self._selector)

    @property
    def covers(self) -> bool:
        """Tell whether a share of the significance is the target."""
        return self._selector.target_coverage is not None

    @property
    def weighs(self) -> bool:
        """Tell whether a plan has importance weights."""
        return self._selector.selects and self._selector.weighting != "none"

    def plan_part(self, epoch: RunningEpoch, offered: Tensor, samples: range, *, count: int) -> EpochPlan:
        """Choose the samples of one of several loaders, whose own are ``samples`` of all that are remembered."""
        history = self.fold()
        if not epoch.sparse:
            return EpochPlan(epoch.number, offered, offered.numel())
        own = history.part(samples)
        return plan_epoch(own, offered, epoch=epoch.number, count=count, selector=self._selector)

    def plan_batches(self, epoch: RunningEpoch, drawn: DrawnBatches, groups: Tensor | None) -> EpochPlan:
        """Choose the samples of an epoch of batches that the user's own batch samplers drew in all processes."""
        assert self.facts is not None
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
            floor = size if self._steps == "keep" else 0
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
                refills=self._steps == "follow",
                most=None if self._own_parts is None else self._own_parts.most,
            )
            self._warn_of_excess(plan.indices.numel(), rate * offered, epoch.sizes.numel(), size)
        epoch.lengths = EpochLengths.of_batches(epoch.sizes[self._processes.rank].tolist())
        return plan

    def split(self, *, sparse: bool) -> dict[str, Any] | None:
        """Return the settings that decide how a plan is dealt out and weighted; None before they are known."""
        if self.facts is None:
            return None
        return {
            "batch_size": self.facts.batch_size,
            "drop_last": int(self.facts.drop_last),
            "processes": self._processes.count if self._own_parts is None else self._own_parts.processes.count,
            "own_parts": 0 if self._own_parts is None else self._own_parts.processes.count,
            "weighting": self._selector.weighting if sparse else None,
            "sample_filter": int(self.filters),
        }

    def _rate_to_cover(self, history: SignificanceHistory, samples: Tensor) -> float:
        """Return the rate at which the coverage is met among some samples, a mask or dataset indices."""
        always = history.rules.always
        significance = history.significance(trim=self._selector.trim)[samples]
        always = None if always is None else always[samples]
        target = self._selector.target
        if self._own_parts is None:
            rate = rate_to_cover(significance, target, self._selector.gate, always=always)
        else:
            assert self.facts is not None
            assert self._own is not None
            share = self.facts.offered / self._own.offered
            total = self._own_parts.total
            rate = common_rate(significance, target, self._selector.gate, total=total, share=share, always=always)
        return max(rate, history.rules.class_floor)

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
        if self._steps == "keep":
            wanted = rate * self.facts.offered
            self._warn_of_excess(lengths.samples, wanted, lengths.batches, self.facts.batch_size)
        return lengths

    def _warn_of_excess(self, loaded: int, wanted: float, batches: int, size: int) -> None:
        """Warn, once, where batches that must not become too small load more than the target needs."""
        assert self.facts is not None
        if self._has_warned or loaded <= (1 + _EXCESS) * wanted:
            return
        self._has_warned = True
        own = self.facts.batching == "own"
        names = "a batch sampler that names its group_ids and " if own else ""
        rank_zero_warn(
            f"lightning-ast: prune_steps={self._steps!r} leaves {counted(loaded // batches, 'sample')} in "
            f"each batch of {size}, or what min_selected asks for: {loaded} samples are "
            f"loaded where the target needs {round(wanted)}. Use larger batches, or {names}prune_steps='follow'."
        )


def _check_certain(history: SignificanceHistory, offered: Tensor, count: int) -> None:
    """Refuse a plan that cannot hold all samples that it must hold."""
    if history.rules.always is None:
        return
    certain = int((history.rules.always & ~history.withheld)[offered].sum())
    if certain > count:
        raise ConfigurationError(
            [
                f"always: {counted(certain, 'sample')} of the epoch must be trained on, and at this target it loads "
                f"{count}: raise the target, or name fewer samples."
            ]
        )
