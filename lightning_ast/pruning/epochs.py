"""Mode ``prune`` inside Lightning's fit loop: the plan of each epoch, its lengths, and what a resumed run continues."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_ast.core.history import EpochPlan, SignificanceHistory, plan_epoch
from lightning_ast.core.selector import SampleSelector
from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.distributed import Processes
from lightning_ast.lightning_internals.fit_loop import announce_batches, loaders, set_up_loaders
from lightning_ast.lightning_internals.leading import lead
from lightning_ast.lightning_internals.reloading import (
    hold_reload,
    last_reloads,
    reload_as_due,
    reload_validation_as_due,
)
from lightning_ast.lightning_internals.resuming import batches_done, begin_new_epoch, restart_loader
from lightning_ast.lightning_internals.run_limits import accumulation, epochs_done
from lightning_ast.pruning.epoch import PlannedBatch, RunningEpoch, check_split
from lightning_ast.pruning.loader import (
    Drawn,
    LoaderFacts,
    PrunedLoader,
    PrunedSampler,
    draw,
    loader_faults,
    loader_generators,
    set_states,
)
from lightning_ast.pruning.run_plan import (
    EpochLengths,
    PlannedRun,
    length_faults,
    planned_run,
    promise_steps,
    size_faults,
)
from lightning_ast.schedule import Schedule

__all__ = ["PrunedEpochs"]

_CHUNK = 4096


class PrunedEpochs:
    """The plans of the epochs, with the loader, Lightning's counters and the checkpoint kept in step with them.

    The plan is drawn when the loader asks for the first index of an epoch: there the user's own sampler would have
    drawn. How many samples it will have is known before, so that lengths and schedules can be.

    Args:
        owner: The selection callback.
        trainer: The trainer of this fit.
        selector: The gate, weighting, seed and target of the selection.
        schedule: Warmup and cooldown.
        processes: The processes that train together.
    """

    def __init__(
        self,
        owner: Callback,
        trainer: pl.Trainer,
        selector: SampleSelector,
        schedule: Schedule,
        processes: Processes,
    ) -> None:
        self._owner = owner
        self._trainer = trainer
        self._selector = selector
        self._schedule = schedule
        self._processes = processes
        self._maximum = processes.maximum if processes.count > 1 else None
        self._accumulate = accumulation(trainer)
        self.history: SignificanceHistory | None = None
        self._facts: LoaderFacts | None = None
        self._pruned: PrunedLoader | None = None
        self._resumes = False
        self._observes = True
        self._loaded: dict[str, Any] | None = None
        self._undo: list[Callable[[], None]] = []
        self.epoch = RunningEpoch(0, "warmup", sparse=False, lengths=EpochLengths(0, 0))

    # ------------------------------------------------------------------ the loader

    def attach(self) -> None:
        """Prune every training loader that Lightning sets up from here on."""
        self._undo = [
            lead(self._trainer.fit_loop, load=self._load, begin=self._begin),
            promise_steps(self._trainer, self.planned_steps),
        ]

    def detach(self) -> None:
        """Leave the trainer as it was; the user's loader was never touched. Safe to call twice."""
        while self._undo:
            self._undo.pop()()
        self._pruned = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes of a copy, which leads no fit loop."""
        return {**vars(self), "_undo": []}

    def ensure_installed(self) -> None:
        """Set the loader up anew where a tuner did so, which takes the callbacks out of the trainer for its trials."""
        loop = self._trainer.fit_loop
        if self._facts is None:
            set_up_loaders(loop, anew=True)
        if self._resumes and self._loaded is not None:
            hold_reload(loop)
        self._announce()

    def _load(self, combined: CombinedLoader) -> CombinedLoader:
        if self._owner not in self._trainer.callbacks:  # type: ignore[attr-defined]
            self._facts = None
            return combined
        faults = loader_faults(combined, processes=self._processes.count)
        if not faults:
            self._facts = LoaderFacts.of(combined)
            remembered = None if self.history is None else len(self.history)
            faults = length_faults(self.run, self._trainer, self._facts, remembered=remembered)
        if faults:
            raise ConfigurationError(faults)
        assert self._facts is not None
        if self.history is None:
            self._load_history()
        if self._pruned is not None and self._pruned.given.flattened[0] is combined.flattened[0]:
            self._pruned.given = combined  # reloaded, but not anew: its workers may persist
        else:
            make = functools.partial(PrunedSampler, indices=self._indices, length=self._samples)
            self._pruned = PrunedLoader(combined, make)
        self._start(epochs_done(self._trainer))
        self._pruned.limits = self.epoch.lengths.batches
        return self._pruned

    # ------------------------------------------------------------------ lengths

    @property
    def run(self) -> PlannedRun:
        """Return the run that the trainer's limits make."""
        assert self._facts is not None
        return planned_run(
            self._trainer,
            self._facts,
            schedule=self._schedule,
            accumulate=self._accumulate,
            rate=self._selector.target_activation_rate,
            min_selected=self._selector.min_selected,
            processes=self._processes.count,
        )

    def planned_steps(self) -> float:
        """Count the optimizer steps of the whole run; set the loader up where that was not done yet."""
        if self._facts is None:
            set_up_loaders(self._trainer.fit_loop)
        return math.inf if self._facts is None else self.run.steps

    def _samples(self) -> int:
        return self.epoch.lengths.samples

    def _announce(self) -> None:
        """Tell Lightning, and what it fetches from, how many batches the running epoch has."""
        if self._pruned is not None:
            self._pruned.limits = self.epoch.lengths.batches
            announce_batches(self._trainer, self.epoch.lengths.batches)

    # ------------------------------------------------------------------ an epoch

    def _start(self, epoch: int) -> None:
        run = self.run
        stage = run.stage(epoch)
        sparse = stage == "sparse" and self._selector.target_activation_rate < 1
        self.epoch = RunningEpoch(epoch, stage, sparse, run.sparse if sparse else run.dense)
        # Scores of an early warmup epoch would be replaced before anything is planned from them: none are taken.
        self._observes = not stage == run.stage(epoch + 1) == "warmup"

    def _begin(self, epoch: int) -> None:
        """Prepare the epoch that Lightning is about to run; the first one's loader has already started."""
        if self._facts is None:
            return
        if self._resumes:
            self._resumes = False
            self._resume(epoch)
            return
        if epoch != self.epoch.number:
            self._start(epoch)
        self._announce()

    def _indices(self, sampler: Drawn) -> Iterator[int]:
        """Yield the epoch's dataset indices for this process, from the position on."""
        if self._resumes:  # Lightning started the loader before it knew where the run continues
            return
        epoch = self.epoch
        if not epoch.replays or epoch.plan is None:
            epoch.plan = self._make_plan(sampler)
        epoch.replays = False  # a loader that is started twice draws twice, as without this callback
        assert self._facts is not None
        share = self._processes.share(epoch.plan.indices)[epoch.resumed_at * self._facts.batch_size :]
        # in chunks: a list of all indices of a large data set would take several times the tensor's memory
        for start in range(0, len(share), _CHUNK):
            yield from share[start : start + _CHUNK].tolist()
        set_states(self._generators(), epoch.drained)

    def _make_plan(self, sampler: Drawn) -> EpochPlan:
        assert self.history is not None
        assert self._facts is not None
        for loader in loaders(self._trainer.fit_loop):
            if faults := size_faults(len(self.history), len(loader.dataset)):
                raise ConfigurationError(faults)
        self.history.fold(self._maximum)
        # Every process draws its own part as it would without pruning, and all plan from the parts put together: the
        # plan is then the same in all, whatever the sampler does.
        own, self.epoch.drained = draw(sampler, self._facts, self._generators())
        draws = self._processes.interleaved(own)
        if not self.epoch.sparse:
            return EpochPlan(self.epoch.number, draws, self._facts.offered * self._processes.count)
        offered = draws[: self._facts.offered * self._processes.count]
        count = self.epoch.lengths.samples * self._processes.count
        return plan_epoch(self.history, offered, epoch=self.epoch.number, count=count, selector=self._selector)

    def next_batch(self, batch_size: int, own: Tensor | None) -> PlannedBatch:
        """Return the part of the plan that the next batch of the epoch is.

        Args:
            batch_size: The samples that the batch holds.
            own: ``(B,)`` dataset indices of its samples where the module can tell, else None: those that were drawn.

        Raises:
            ConfigurationError: It does not hold the samples that were to be loaded.
        """
        assert self._facts is not None
        return self.epoch.next_batch(batch_size, own, planned_size=self._facts.batch_size, share=self._processes.share)

    def observer_of(self, planned: PlannedBatch) -> Callable[[Tensor], None] | None:
        """Return what remembers the significance ``(B,)`` of a batch; None where its epoch is not remembered."""
        assert self.history is not None
        return functools.partial(self.history.observe, planned.indices) if self._observes else None

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return the scores, the plan and the random state of all processes; every process must ask for it."""
        maximum = None if self._processes.failing else self._maximum
        return {
            "history": None if self.history is None else self.history.state_dict(maximum),
            **self.epoch.state_dict(),
            "split": None if self._facts is None else self._split(self._facts, sparse=self.epoch.sparse),
            **last_reloads(self._trainer.fit_loop),
            "random": self._processes.random_states(),
            "generators": [generator.get_state() for generator in self._generators()],
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Keep a state until the loader, the epoch and the position in it are known."""
        self._loaded = state
        if self.history is not None:
            self._load_history()

    def expect_resume(self) -> None:
        """Prepare for a checkpoint: a loader that starts before the epoch is known yields nothing."""
        self._resumes = True
        self.load_state_dict(None)  # of an earlier fit; the checkpoint's follows, if it has one

    def _load_history(self) -> None:
        assert self._facts is not None
        self.history = SignificanceHistory(self._facts.dataset_size)
        state = None if self._loaded is None else self._loaded["history"]
        if state is not None:
            try:
                self.history.load_state_dict(state)
            except ValueError as error:
                if self._resumes:
                    raise ConfigurationError([str(error)]) from error
                rank_zero_warn("lightning-ast: the data set is not the last fit's: what was remembered is forgotten.")

    def _generators(self) -> list[torch.Generator]:
        return [generator for loader in loaders(self._trainer.fit_loop) for generator in loader_generators(loader)]

    def _resume(self, epoch: int) -> None:
        """Continue in ``epoch``: with the rest of its plan, or with a new one where it has not begun."""
        loop = self._trainer.fit_loop
        state = self._loaded or {}
        self._start(epoch)
        reload_validation_as_due(loop, state.get("validation_reloaded"))
        goes_on = state.get("plan") is not None and state["plan"]["epoch"] == epoch
        if goes_on:
            assert self._facts is not None
            check_split(state["split"], self._split(self._facts, sparse=bool(state["sparse"])))
            self.epoch = RunningEpoch.resumed(state, batches_done(loop))
            rank_zero_info(f"lightning-ast: resuming epoch {epoch} behind batch {self.epoch.batch}, with its plan.")
        else:
            self.epoch.resumed_at = self.epoch.batch = batches_done(loop)
            self._restore_random_state()
            begin_new_epoch(loop)
        reload_as_due(loop, state.get("reloaded"), new_epoch=not goes_on)
        self._announce()
        restart_loader(loop)
        # The saved state is that after the loader was started: workers get their seeds from the generators there. In a
        # new epoch the start itself has to draw from the saved state, so that it was restored before.
        if goes_on:
            self._restore_random_state()

    def _split(self, facts: LoaderFacts, *, sparse: bool) -> dict[str, Any]:
        """Return the settings that decide how a plan is dealt out and weighted."""
        return {
            "batch_size": facts.batch_size,
            "drop_last": int(facts.drop_last),
            "processes": self._processes.count,
            "weighting": self._selector.weighting if sparse else None,
        }

    def _restore_random_state(self) -> None:
        if self._loaded is not None:
            self._processes.restore_random_states(self._loaded["random"])
            set_states(self._generators(), self._loaded["generators"])
