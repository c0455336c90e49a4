"""Mode ``prune`` inside Lightning's fit loop: the plan of each epoch, its lengths, and what a resumed run continues."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from torch import Tensor

from lightning_ast.core.history import SignificanceHistory
from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.fit_loop import announce_batches, epochs_done, loaders, set_up_loaders
from lightning_ast.lightning_internals.leading import StandInLoader, lead
from lightning_ast.lightning_internals.resuming import (
    batches_done,
    begin_new_epoch,
    hold_reload,
    last_reloads,
    leave_start,
    reload_as_due,
    reload_validation_as_due,
    restart_loader,
)
from lightning_ast.pruning.epoch import PlannedBatch, RunningEpoch, check_split, check_steps, mean_significance
from lightning_ast.pruning.followed_steps import advance_schedulers
from lightning_ast.pruning.loader import (
    LoaderFacts,
    loader_faults,
    loader_generators,
    pruned_loader,
    set_states,
    source_of,
)
from lightning_ast.pruning.own_parts import sharing_faults
from lightning_ast.pruning.planner import EpochPlanner
from lightning_ast.pruning.run_plan import EpochLengths, PlannedRun, length_faults, promise_steps, size_faults

__all__ = ["PrunedEpochs"]


class PrunedEpochs:
    """The plans of the epochs, with the loader, Lightning's counters and the checkpoint kept in step with them."""

    sizes: tuple[int, ...] = ()  # of the batches of several loaders
    batches_are_samples = False  # the dataset makes the batches, each of which the plan takes for one sample

    def __init__(self, owner: Callback, trainer: pl.Trainer, planner: EpochPlanner) -> None:
        self._owner = owner
        self._trainer = trainer
        self._planner = planner
        self._parts = planner.parts
        self._processes = planner.parts.sharing
        self._advance: Callable[[int], None] | None = None
        self._pruned: StandInLoader | None = None
        self._resumes = False
        self._observes = True
        self._loaded: dict[str, Any] | None = None
        self._undo = ExitStack()
        self.epoch = RunningEpoch(0, "warmup", sparse=False, lengths=EpochLengths(0, 0))

    def attach(self) -> None:
        """Prune every training loader that Lightning sets up from here on."""
        self._undo.callback(lead(self._trainer.fit_loop, load=self._load, begin=self._begin, keeps_place=True))
        self._undo.callback(promise_steps(self._trainer, self.planned_steps))

    def detach(self) -> None:
        """Leave the trainer as it was; the user's loader was never touched. Safe to call twice."""
        self._undo.close()
        self._pruned = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes of a copy, which leads no fit loop."""
        # A module that is copied brings its trainer; what undoes a change of it must not be done by the copy as well.
        return {**vars(self), "_undo": ExitStack()}

    def ensure_installed(self) -> None:
        """Set the loader up anew where a tuner did so, which takes the callbacks out of the trainer for its trials."""
        loop = self._trainer.fit_loop
        if not self._planner.knows_loader:
            set_up_loaders(loop, anew=True)
        if self._resumes and self._loaded is not None:
            hold_reload(loop)
        self._announce()

    def _load(self, combined: CombinedLoader) -> CombinedLoader:
        if self._owner not in self._trainer.callbacks:  # type: ignore[attr-defined]
            self._planner.knows_loader = False  # a tuner's trial: it trains without callbacks, on the plain loader
            return combined
        sharing = sharing_faults(combined.flattened) if self._parts.are_own else []
        self._refuse(sharing + self._faults_of(combined))
        facts = self._facts_of(combined)
        self._planner.take(facts)
        self.batches_are_samples = facts.batching == "ready"
        faults = [] if self.history is None else size_faults(len(self.history), facts.dataset_size)
        faults += length_faults(self.run, self._trainer, self._planner.facts)
        if self.batches_are_samples and self._planner.steps == "keep":
            faults.append(
                "prune_steps='keep' keeps the number of batches, and with batch_size=None it is whole batches that are "
                "left out: use prune_steps='follow'."
            )
        self._refuse(faults)
        if self.history is None:
            self._refuse(self._begin_history() or self._planner.unknown_faults())
        if self._pruned is not None and [*map(id, self._pruned.given.flattened)] == [*map(id, combined.flattened)]:
            self._pruned.given = combined  # reloaded, but not anew: its workers may persist
        else:
            self._pruned = self._loader_for(combined)
        # Lightning starts the loader before it tells the epoch's start: the length has to be right by now.
        self._start(epochs_done(self._trainer))
        self._plan_ahead()
        self._pruned.limits = self._batches_ahead
        return self._pruned

    def _begin_history(self) -> list[str]:
        try:
            self._planner.begin_history(self._loaded, resumes=self._resumes)
        except ConfigurationError as error:
            return error.faults
        return []

    def _refuse(self, faults: list[str]) -> None:
        """Refuse what any process has found to be wrong."""
        if found := self._parts.all_faults(faults):
            raise ConfigurationError(found)

    def _faults_of(self, combined: CombinedLoader) -> list[str]:
        return loader_faults(combined, processes=self._processes.count)

    def _facts_of(self, combined: CombinedLoader) -> LoaderFacts:
        return LoaderFacts.of(combined)

    def _loader_for(self, combined: CombinedLoader) -> StandInLoader:
        stand_ins = [
            pruned_loader(loader, batches=functools.partial(self._batches, number), count=self._count_batches)
            for number, loader in enumerate(combined.flattened)
        ]
        return StandInLoader(combined, stand_ins)

    def _count_batches(self) -> int:
        return len(self.epoch.lengths.starts) - 1

    @property
    def _batches_ahead(self) -> int | float:
        """Return the number of batches that Lightning is told of; infinitely many where the loader ends the epoch."""
        return self.epoch.lengths.batches

    @property
    def history(self) -> SignificanceHistory | None:
        """Return what is remembered of each sample; None before the data set is known."""
        return self._planner.history

    @property
    def run(self) -> PlannedRun:
        """Return the run that the trainer's limits make."""
        return self._planner.run

    def planned_steps(self) -> float:
        """Count the optimizer steps of the whole run; set the loader up where that was not done yet."""
        if not self._planner.knows_loader:
            set_up_loaders(self._trainer.fit_loop)
        return self.run.steps if self._planner.knows_loader else math.inf

    def _announce(self) -> None:
        """Tell Lightning, and what it fetches from, how many batches the running epoch has."""
        if self._pruned is not None:
            self._pruned.limits = self._batches_ahead
            announce_batches(self._trainer, self._batches_ahead)

    def _start(self, epoch: int) -> None:
        if self._planner.begin_target is not None and not self._resumes:
            self._planner.begin_target(epoch)
        run = self.run
        stage = run.stage(epoch)
        lengths = self._planner.sparse_lengths() if stage == "sparse" and not self._resumes else None
        self._enter(RunningEpoch(epoch, stage, lengths is not None, run.dense if lengths is None else lengths))

    def _enter(self, epoch: RunningEpoch) -> None:
        run = self.run
        self.epoch = epoch
        # Scores of an early warmup epoch would be replaced before anything is planned from them: none are taken.
        is_early = epoch.stage == run.stage(epoch.number + 1) == "warmup"
        self._observes = self._planner.samples.keep_scores > 0 or not is_early
        self._advance = None
        if epoch.sparse and run.follows:
            factor = run.dense_run.factor(epoch.number)
            lengths = {"dense": run.dense.batches, "pruned": epoch.lengths.batches, "accumulate": factor}
            self._advance = functools.partial(advance_schedulers, self._trainer, **lengths)

    def _begin(self, epoch: int) -> None:
        """Prepare the epoch that Lightning is about to run; the first one's loader has already started."""
        if self._pruned is None or not self._planner.knows_loader:
            return
        if self._resumes:
            self._resumes = False
            self._resume(epoch)
            return
        has_changed = epoch > 0 and self._planner.count_anew(self._pruned.given)
        if has_changed or epoch != self.epoch.number:
            self._start(epoch)
        self._plan_ahead(anew=epoch > 0)  # Lightning starts the loader of any epoch but the first once more
        self._announce()

    def _plan_ahead(self, *, anew: bool = False) -> None:
        """Draw and plan the epoch where nothing else tells how many batches it has; ``anew`` also one with a plan."""
        epoch = self.epoch
        is_unknown = self._planner.draws_batches and self._planner.steps == "follow" and epoch.sparse
        if self._resumes or not is_unknown or (epoch.plan is not None and not anew):
            return
        (loader,) = loaders(self._trainer.fit_loop)
        _, sampler = source_of(loader)
        if callable(set_epoch := getattr(sampler, "set_epoch", None)):
            # Lightning leaves it to the user's own hook, on_train_epoch_start, which comes later.
            set_epoch(epoch.number)
        epoch.plan = self._planner.draw(epoch, sampler, self._generators())
        epoch.replays = True
        self._enter(epoch)

    def _batches(self, number: int, sampler: Any, started: Iterator[Any] | None) -> Iterator[list[int]]:
        """Yield the dataset indices of the epoch's batches for this process, from the batch on that comes next."""
        # The plan is drawn here, where the user's own sampler would have drawn. How many samples it has was known
        # before, so that lengths and schedules could be.
        if self._resumes:  # Lightning started the loader before it knew where the run continues
            return
        epoch = self.epoch
        if not epoch.replays or epoch.plan is None:
            epoch.plan = self._planner.draw(epoch, sampler, self._generators(), started=started)
        epoch.replays = False  # a loader that is started twice draws twice, as without this callback
        yield from epoch.deal(self._processes, self._generators)

    def sizes_of(self, batch: Any) -> tuple[int, ...]:
        """Return the number of samples that each of several loaders puts into a batch; nothing for one loader."""
        return ()

    def next_batch(self, batch_size: int, own: Tensor | None) -> PlannedBatch:
        """Return the next batch's part of the plan; ``own`` are its dataset indices, where the module can tell."""
        if self.batches_are_samples:
            return self.epoch.next_batch(1, None, self._processes).repeated(batch_size)
        return self.epoch.next_batch(batch_size, own, self._processes)

    def finish_batch(self) -> None:
        """Advance schedules by the dense steps that the batch stands for beside its own."""
        if self._advance is not None:
            self._advance(self.epoch.batch)

    def observer_of(self, planned: PlannedBatch) -> Callable[[Tensor], None] | None:
        """Return what remembers the significance ``(B,)`` of a batch; None where its epoch is not remembered."""
        history = self.history
        if history is None or not self._observes:
            return None
        if self.batches_are_samples:
            return lambda significance: history.observe(planned.indices[:1], mean_significance(significance))
        return functools.partial(history.observe, planned.indices)

    def state_dict(self) -> dict[str, Any]:
        """Return the scores, the plan and the random state of all processes; every process must ask for it."""
        # A process that fails saves what it has observed itself: the others may never come to a collective call.
        maximum = None if self._processes.failing else self._processes.maximum
        total = None if self._processes.failing else self._processes.total
        history = self.history
        record = None if history is None else history.record
        return {
            "history": None if history is None else history.state_dict(maximum),
            "samples": None if record is None else record.state_dict(total, maximum),
            **self.epoch.state_dict(),
            "steps": self._planner.steps,
            "split": self._planner.split(sparse=self.epoch.sparse),
            **last_reloads(self._trainer.fit_loop),
            "random": self._parts.everyone.random_states(),
            "generators": [generator.get_state() for generator in self._generators()],
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Keep a state until the loader, the epoch and the position in it are known."""
        self._loaded = state
        if self.history is not None:
            self._planner.begin_history(self._loaded, resumes=self._resumes)

    def expect_resume(self) -> None:
        """Prepare for a checkpoint: a loader that starts before the epoch is known yields nothing."""
        self._resumes = True
        self.load_state_dict(None)  # of an earlier fit; the checkpoint's follows, if it has one

    def _generators(self) -> list[Any]:
        return [generator for loader in loaders(self._trainer.fit_loop) for generator in loader_generators(loader)]

    def _resume(self, epoch: int) -> None:
        """Continue in ``epoch``: with the rest of its plan, or with a new one where it has not begun."""
        assert self._pruned is not None
        loop = self._trainer.fit_loop
        state = self._loaded or {}
        reload_validation_as_due(loop, state.get("validation_reloaded"))
        # A checkpoint without the setting is of a release that knew "replan" alone.
        if any(config.interval == "step" for config in self._trainer.lr_scheduler_configs):
            check_steps(state.get("steps", "replan") if state else self._planner.steps, self._planner.steps)
        goes_on = state.get("plan") is not None and state["plan"]["epoch"] == epoch
        if goes_on:
            check_split(state["split"], self._planner.split(sparse=bool(state["sparse"])))
            self._enter(RunningEpoch.resumed(state, batches_done(loop), rank=self._processes.rank))
            rank_zero_info(f"lightning-ast: resuming epoch {epoch} behind batch {self.epoch.batch}, with its plan.")
        else:
            self._planner.count_anew(self._pruned.given)
            self._start(epoch)
            self.epoch.resumed_at = self.epoch.batch = batches_done(loop)
            self._restore_random_state()
            begin_new_epoch(loop)
        reload_as_due(loop, state.get("reloaded"), new_epoch=not goes_on)
        if not goes_on:
            self._plan_ahead(anew=epoch > 0)
            if epoch > 0 and self._planner.draws_batches:
                leave_start(loop)
        self._announce()
        restart_loader(loop)
        # The saved state is that after the loader was started: workers get their seeds from the generators there. In a
        # new epoch the start itself has to draw from the saved state, so that it was restored before.
        if goes_on:
            self._restore_random_state()

    def _restore_random_state(self) -> None:
        if self._loaded is not None:
            self._parts.everyone.restore_random_states(self._loaded["random"])
            set_states(self._generators(), self._loaded["generators"])
